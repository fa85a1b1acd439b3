"""First on PYTHONPATH: every Python process refuses and logs connections to other machines."""

import ipaddress
import os
import socket
import sys


def _outside(host):
    if host in (None, "", b"", "localhost", socket.gethostname()):
        return False
    if str(host) in ("0.0.0.0", "::"):
        return False
    try:
        address = ipaddress.ip_address(host if isinstance(host, str) else host.decode())
    except ValueError:
        return True
    return not address.is_loopback


def _watch(event, args):
    if event == "socket.getaddrinfo" or event == "socket.gethostbyname":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[-1]
        if not isinstance(address, tuple):
            return  # a local socket file
        host = address[0]
    else:
        return
    if _outside(host):
        with open(os.environ["MEDFT_SOCKET_LOG"], "a") as f:
            f.write(f"{event} {host} by {' '.join(sys.argv)[:200]}\n")
        raise OSError(f"blocked: {event} {host}")


if os.environ.get("MEDFT_SOCKET_LOG"):
    sys.addaudithook(_watch)
