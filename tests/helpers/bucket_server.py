"""A bucket on this machine: moto's S3 server on loopback, for everything in this process."""

from contextlib import contextmanager

import pytest


@contextmanager
def bucket(name="med"):
    "The URL of an empty bucket, while its server runs; skips the test where moto is not installed."
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = dict(
        AWS_ACCESS_KEY_ID="k",
        AWS_SECRET_ACCESS_KEY="bucketsecret7",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        NO_PROXY="127.0.0.1",
    )
    with pytest.MonkeyPatch.context() as m:
        for key, value in settings.items():
            m.setenv(key, value)
        import fsspec
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # another test's server has gone
        fsspec.filesystem("s3").mkdir(name)
        try:
            yield f"s3://{name}"
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()
