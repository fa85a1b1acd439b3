"""No secret in any file, no patient's row where it must not go, no default of this machine."""

from medft.cli import runner
from medft.cli import tracking as track
from medft.core import secrets as redaction
from medft.core.files import MedftError, atomic_write, read_json, write_json
from medft.core.recipe import load_recipe
from medft.core.run import Run, host_of, why_hidden
from medft.core.secrets import (
    is_secret_name,
    known_secrets,
    public_url,
    redact,
    redacted,
    secrets_in,
)
from medft.data import pipeline as data
from medft.data.reading import sources

import ast
import base64
import json
import os
import random
import stat
import string
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pandas as pd
import pytest
import yaml

TOP = Path(__file__).resolve().parents[2]
CHANCE = random.Random(7)


def chars(n, alphabet=string.ascii_letters + string.digits):
    "Random characters, the last one a digit and the one before a capital."
    return "".join(CHANCE.choices(alphabet, k=n - 2)) + "Q7"


# ---- nothing of the machine in a default ----
ROOTS = {
    "os",
    "sys",
    "Path",
    "tempfile",
    "socket",
    "getpass",
    "platform",
    "time",
    "uuid",
    "psutil",
    "shutil",
    "importlib",
}


def machine_names(tree):
    "Module-level names whose value is made from this machine's state."
    found = set(ROOTS)
    for node in tree.body:
        if isinstance(node, ast.Assign):
            used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            if used & found and any(isinstance(n, ast.Call) for n in ast.walk(node.value)):
                found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return found


def machine_defaults(text):
    "(function, default) of every default that is evaluated from this machine's state."
    tree = ast.parse(text)
    names = machine_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                if default is None:
                    continue
                used = {n.id for n in ast.walk(default) if isinstance(n, ast.Name)}
                if used & names:
                    yield getattr(node, "name", "lambda"), ast.unparse(default)


def test_no_default_is_a_value_of_this_machine():
    for kind in (
        "os.environ",
        "Path.cwd()",
        "Path.home()",
        "tempfile.gettempdir()",
        "sys.executable",
        "os.cpu_count()",
        "dict(os.environ)",
    ):
        assert list(machine_defaults(f"def f(a, b={kind}): pass")), kind
    assert list(machine_defaults("HERE = Path.cwd()\ndef f(*, a=HERE): pass"))
    found = {p.name: list(machine_defaults(p.read_text())) for p in (TOP / "medft").rglob("*.py")}
    assert not any(found.values()), found


def test_the_site_is_built_without_a_token():
    docs = yaml.safe_load((TOP / ".github/workflows/docs.yaml").read_text())
    build, deploy = docs["jobs"]["build"], docs["jobs"]["deploy"]

    def may(job):
        return docs["permissions"] | job.get("permissions", {})

    assert not {"id-token", "pages"} & set(may(build))
    assert build["permissions"] == {"contents": "read"}
    assert deploy["needs"] == "build"
    assert deploy["permissions"] == {"pages": "write", "id-token": "write"}
    assert not any("run" in step or "checkout" in step["uses"] for step in deploy["steps"]), (
        "what can publish runs nothing of ours"
    )


# ---- names, addresses, shapes ----
def test_names_that_mean_a_secret():
    secret = """
        HF_TOKEN HUGGING_FACE_HUB_TOKEN KAGGLE_KEY PGPASSWORD MYSQL_PWD GITHUB_PAT
        AZURE_STORAGE_KEY ROOT_PASSWD GPG_PASSPHRASE GCP_CREDENTIALS
        MLFLOW_TRACKING_PASSWORD AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY WANDB_API_KEY
        OPENAI_API_KEY NGC_API_KEY RUNPOD_API_KEY DAGSHUB_USER_TOKEN REDIS_AUTH SSHPASSWORD
        AZURE_STORAGE_SAS_TOKEN DJANGO_SECRET_KEY clientSecret apiKey secretAccessKey
        CI_JOB_TOKEN AZURE_STORAGE_CONNECTION_STRING TWILIO_AUTH_TOKEN STRIPE_KEY_2 DB_PASS
        JWT_SECRET private_key_id hub_token NPM_CONFIG__AUTH
    """.split()
    plain = """
        PATH PWD OLDPWD HOME MONKEY KEYBOARD_LAYOUT max_new_tokens num_tokens
        TOKENIZERS_PARALLELISM eos_token pad_token SSH_AUTH_SOCK GIT_ASKPASS PUBLIC_KEY
        include_num_input_tokens_seen XDG_SESSION_ID OMP_NUM_THREADS learning_rate
        dataset.path
    """.split()
    assert [n for n in secret if not is_secret_name(n)] == []
    assert [n for n in plain if is_secret_name(n)] == []


URLS = {
    "https://anna:{}@host/rows.jsonl": "https://host/rows.jsonl",
    "https://{}@host:8443/rows.jsonl?v=1#top": "https://host:8443/rows.jsonl?v=1#top",
    "https://anna:{}/x@host/rows.jsonl": "https://host/rows.jsonl",
    "s3://AKIAIOSFODNN7EXAMPLE:{}@bucket/rows.jsonl": "s3://bucket/rows.jsonl",
    "https://b.s3.amazonaws.com/r.jsonl?versionId=4&X-Amz-Credential=AK%2F2026"
    "&X-Amz-Expires=3600&X-Amz-Signature={}": ("https://b.s3.amazonaws.com/r.jsonl?versionId=4"),
    "https://storage.googleapis.com/b/r.jsonl?X-Goog-Algorithm=GOOG4&X-Goog-Signature={}": (
        "https://storage.googleapis.com/b/r.jsonl"
    ),
    "https://a.blob.core.windows.net/c/r.csv?sv=2022-11-02&se=2027-01-01&sr=b&sp=r&sig={}": (
        "https://a.blob.core.windows.net/c/r.csv"
    ),
    "https://b.s3.amazonaws.com/r.csv?AWSAccessKeyId=AK&Expires=1790000000&Signature={}": (
        "https://b.s3.amazonaws.com/r.csv"
    ),
    "https://d.cloudfront.net/r.csv?Expires=1790000000&Key-Pair-Id=K1&Signature={}": (
        "https://d.cloudfront.net/r.csv"
    ),
    "https://host/r.csv?id=5&token={}&page=2": "https://host/r.csv?id=5&page=2",
    "https://host/r.csv?access_token={}": "https://host/r.csv",
    "https://host/r.csv?api_key={}": "https://host/r.csv",
    "https://host/r.csv?key={}&alt=media": "https://host/r.csv?alt=media",
    "https://host/r.csv?apiKey={}#access_token={}": "https://host/r.csv",
    "https://oss.example/r.csv?OSSAccessKeyId=A&Expires=1&x-oss-signature={}": (
        "https://oss.example/r.csv"
    ),
    "zip://rows.jsonl::https://anna:{}@host/rows.zip?token={}": (
        "zip://rows.jsonl::https://host/rows.zip"
    ),
    "postgresql+psycopg2://anna:{}@db.example:5432/tracking": (
        "postgresql+psycopg2://db.example:5432/tracking"
    ),
    "HTTPS://anna:p@ss{}@host/r.csv": "HTTPS://host/r.csv",
}  # with credentials -> without


@pytest.mark.parametrize("url", list(URLS))
def test_addresses_keep_what_names_a_file_and_nothing_else(url):
    value = chars(24)
    full, public = url.replace("{}", value), URLS[url]
    assert public_url(full) == public and public_url(public) == public
    as_json = json.dumps({"path": full})
    as_html = f"<a href='{full.replace('&', '&amp;')}'>"
    for text in (f"fetched {full}.", as_json, as_html, f"`{full}`, then"):
        assert value not in redact(text, {}) and secrets_in(text, {})
    assert json.loads(redact(as_json, {}))


def test_addresses_without_credentials_stay_as_they_are():
    for url in (
        "https://host:8443/@anna/r.csv?sv=2&page=3&code=E11.9",
        "sqlite:////runs/mlflow.db",
        "https://doi.org/10.1000/j@b.2",
        "s3://bucket/a@b.jsonl",
        "rows.jsonl",
        "http://[::1]:5000/x",
        "file:///data/x",
        "hf://datasets/openlifescienceai/medmcqa",
        "gs://bucket/*.jsonl",
    ):
        assert public_url(url) == url and redact(f"see {url} there", {}) == f"see {url} there"


BASIC = base64.b64encode(b"anna:hunter2hunter2").decode()
HEX = string.hexdigits[:16]
SHAPED = dict(
    hub="hf_" + chars(34),
    github="ghp_" + chars(36),
    github_fine="github_pat_" + chars(22) + "_" + chars(59),
    gitlab="glpat-" + chars(20),
    slack="xoxb-1234567890-1234567890123-" + chars(24),
    slack_hook="https://hooks.slack.com/services/T00000000/B00000000/" + chars(24),
    stripe="sk_live_" + chars(24),
    aws="AKIA" + chars(16, string.ascii_uppercase + string.digits),
    jwt=f"eyJ{chars(20)}.eyJ{chars(30)}.{chars(43)}",
    private_key="\n".join(
        [
            "-----BEGIN OPENSSH PRIVATE KEY-----",
            chars(60),
            chars(60),
            "-----END OPENSSH PRIVATE KEY-----",
        ]
    ),
    basic=f"Authorization: Basic {BASIC}",
    bearer="Authorization: Bearer " + chars(40),
    openai="sk-proj-" + chars(48),
    openai_old="sk-" + chars(20) + "T3BlbkFJ" + chars(20),
    anthropic="sk-ant-api03-" + chars(60),
    npm="npm_" + chars(36),
    pypi="pypi-AgEIcHlwaS5vcmc" + chars(80),
    google="AIza" + chars(35),
    nvidia="nvapi-" + chars(60),
    replicate="r8_" + chars(37),
    sendgrid=f"SG.{chars(22)}.{chars(43)}",
    telegram="1234567890:" + chars(35),
    databricks="dapi" + "".join(CHANCE.choices(HEX, k=32)),
    azure="AccountKey=" + chars(86) + "==",
    azure_url="https://a.blob.core.windows.net/c/r.csv?sv=2022&sig=" + chars(43),
    env_line="PGPASSWORD=hunter2-" + chars(8),
    argument=f'login(token="{chars(20)}")',
    json_key=f'{{"api_key": "{chars(20)}"}}',
    option="--password " + chars(12),
    url="https://anna:" + chars(20) + "@host/x",
)


def secret_part(secret):
    "The part of a planted secret that must not be found."
    for text in (
        "T3BlbkFJ",
        "Basic ",
        "Bearer ",
        "PGPASSWORD=",
        "AccountKey=",
        "sig=",
        'token="',
        '": "',
        "--password ",
        "anna:",
        "\n",
    ):
        secret = secret.partition(text)[2] or secret
    return secret.split('"')[0].split("@")[0].split("\n")[0][-12:]


@pytest.mark.parametrize("kind", list(SHAPED))
def test_tokens_are_known_by_their_shape(kind):
    secret = SHAPED[kind]
    for text in (
        secret,
        f"it failed: {secret} was refused",
        json.dumps(dict(said=[secret, "x"])),
        repr(secret),
        f"key: {secret}\nnext: 1",
    ):
        assert secret_part(secret) not in redact(text, {}), text
        assert secrets_in(text, {}) and secret_part(secret) not in " ".join(secrets_in(text, {}))
    assert secret_part(secret) not in json.dumps(redacted(dict(a=[secret], b={secret: 1}), {}))


def test_medical_text_and_our_own_pages_are_left_alone():
    lines = [
        "APACHEIIscore 21",
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "eos_token: <|im_end|>",
        "token economy: secret: none",
        "basic metabolic panel",
        "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ",
        "loss 0.12345678",
        "password policy: see intranet",
        "key: aspirin 100 mg",
        "max_new_tokens=4096",
        "meta-llama/Llama-3.1-8B-Instruct",
    ]
    assert [line for line in lines if redact(line, {}) != line] == []
    for page in [
        *(TOP / "nbs").glob("0[1-6]_*.ipynb"),
        *(TOP / "runs").glob("*.yaml"),
        TOP / "README.md",
        TOP / "medft/assets/card.md.j2",
    ]:
        text = page.read_text(encoding="utf-8")
        assert redact(text, {}) == text, page


def test_values_are_found_however_they_are_written():
    value = "a/b+c\"d'e & f9"
    held = dict(MY_PASSWORD=value)
    forms = [
        value,
        json.dumps(value),
        json.dumps(json.dumps(value)),
        repr(value),
        quote(value),
        quote(value, safe=""),
        value.replace("&", "&amp;"),
        base64.b64encode(value.encode()).decode(),
        value.replace(" ", "\n  "),
    ]
    for form in forms:
        assert redact(f"x {form} y", held) in (
            "x *** y",
            'x "***" y',
            "x '***' y",
            'x "\\"***\\"" y',
        ), form
    assert redact("12345678 and 112345678", dict(A_PIN_KEY="12345678")) == "*** and 112345678"
    assert redact("a short one", dict(A_TOKEN="short")) == "a short one"


def test_where_this_machine_keeps_secrets(tmp_path, monkeypatch):
    home = tmp_path / "home"
    plan = {
        ".cache/huggingface/token": "plainhubtoken01",
        ".netrc": "machine a login b password netrcsecret02\n",
        ".kaggle/kaggle.json": '{"username": "u", "key": "kagglesecret03"}',
        ".aws/credentials": "[default]\naws_access_key_id = id0000000004\n"
        "aws_secret_access_key = /awssecret/05\n",
        ".pgpass": "host:5432:db:user:pgpasssecret06\n",
        ".git-credentials": "https://user:gitsecret07@github.com\n",
        ".docker/config.json": '{"auths": {"r": {"auth": "dXNlcjpzZWNyZXQwOA=="}}}',
        ".npmrc": "//registry/:_authToken=npmsecret09\n",
    }
    for name, text in plan.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (tmp_path / ".env").write_text('export EXTRA_API_KEY="dotenvsecret10"\n')
    (tmp_path / "secret.txt").write_text("filesecret11\n")
    monkeypatch.chdir(tmp_path)
    for k in ("HF_HOME", "HF_TOKEN_PATH", "NETRC", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DB_PASSWORD_FILE", str(tmp_path / "secret.txt"))
    monkeypatch.setenv("DATABASE_URL", "postgresql://anna:dbsecret12@db/x")
    monkeypatch.setenv("STORE_CONNECTION_STRING", "Endpoint=sb://x;SharedAccessKey=sassecret13=")
    monkeypatch.setenv("SERVICE_ACCOUNT", '{"private_key": "jsonsecret14"}')
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/slashsecret15")
    monkeypatch.setenv("DEPLOY_KEY", str(home))
    found = known_secrets()
    for n in (
        "plainhubtoken01",
        "netrcsecret02",
        "kagglesecret03",
        "id0000000004",
        "/awssecret/05",
        "pgpasssecret06",
        "gitsecret07",
        "dXNlcjpzZWNyZXQwOA==",
        "npmsecret09",
        "dotenvsecret10",
        "filesecret11",
        "dbsecret12",
        "sassecret13=",
        "jsonsecret14",
        "/slashsecret15",
    ):
        assert n in found, n
    assert str(home) not in found
    (home / ".netrc").write_text("machine a login b password anothersecret16\n")
    assert "anothersecret16" in known_secrets(), "a changed file is read again"


# ---- a run with planted secrets ----
ENVIRONMENT = {
    name: chars(20)
    for name in """
        KAGGLE_KEY PGPASSWORD GITHUB_PAT AZURE_STORAGE_KEY DB_PASSWD SSH_PASSPHRASE
        GCP_CREDENTIALS MLFLOW_TRACKING_PASSWORD WANDB_API_KEY OPENAI_API_KEY
        NGC_API_KEY RUNPOD_API_KEY DAGSHUB_USER_TOKEN HF_TOKEN HUGGING_FACE_HUB_TOKEN
    """.split()
} | dict(AWS_SECRET_ACCESS_KEY="/" + chars(38), REDIS_URL=f"redis://:{chars(16)}@cache:6379/0")
PASSWORD, SIGNATURE = "hunter2" + chars(12), chars(43)


def words(n):
    return " ".join("".join(CHANCE.choices(string.ascii_lowercase, k=7)) for _ in range(n))


ROWS = "".join(
    json.dumps(dict(question=f"What treats {words(8)}?", answer=f"{words(3)} does.")) + "\n"
    for _ in range(40)
)  # none like another


class Guarded(BaseHTTPRequestHandler):
    "Gives the rows to those who know the password and the signature."

    def do_GET(self):
        user = base64.b64encode(f"anna:{PASSWORD}".encode()).decode()
        allowed = (
            self.headers.get("Authorization") == f"Basic {user}"
            and f"X-Amz-Signature={SIGNATURE}" in self.path
        )
        body = ROWS.encode() if allowed else b"no"
        self.send_response(200 if allowed else 403)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with HTTPServer(("127.0.0.1", 0), Guarded) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{made.server_port}"
        made.shutdown()


class Client:
    "An MLflow client that keeps what it is sent."

    def __init__(self, artifact_uri=""):
        self.sent, self.files, self.artifact_uri = [], {}, artifact_uri

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="1")

    def search_runs(self, *args, **kw):
        return []

    def create_run(self, *args):
        self.sent.append(args)
        return SimpleNamespace(info=SimpleNamespace(run_id=f"r{len(self.sent)}"))

    def get_run(self, run_id):
        return SimpleNamespace(
            info=SimpleNamespace(artifact_uri=self.artifact_uri, lifecycle_stage="active")
        )

    def log_batch(self, run_id, **kw):
        self.sent.append({k: [dict(x) for x in v] for k, v in kw.items()})

    def log_inputs(self, run_id, datasets):
        self.sent.append([(d.dataset.name, d.dataset.source) for d in datasets])

    def set_tag(self, *args):
        self.sent.append(args)

    def set_terminated(self, *args):
        self.sent.append(args)

    def update_run(self, *args, **kw):
        pass

    def log_artifact(self, run_id, path, where):
        self.files[f"{where}/{Path(path).name}" if where else Path(path).name] = Path(
            path
        ).read_text()


def mirrored(run, uri, **more):
    "What a tracking store would get of a run."
    mirror = track.Mirror(run.path, uri)
    mirror.client = Client(**more)
    mirror.sync()
    return mirror.client


def executed(cells):
    "A notebook as papermill leaves it."
    metadata = dict(papermill=dict(parameters=dict(recipe="r", note=cells[0]), exception=True))
    made = [
        dict(
            cell_type="code",
            id=f"c{i}",
            execution_count=i,
            metadata={},
            source=f"said = {text!r}\nprint(said)".splitlines(True),
            outputs=[
                dict(
                    output_type="stream",
                    name="stdout",
                    text=[line + "\n" for line in text.splitlines()],
                ),
                dict(
                    output_type="display_data", metadata={}, data={"text/html": [f"<b>{text}</b>"]}
                ),
                dict(
                    output_type="error",
                    ename="HTTPError",
                    evalue=text,
                    traceback=[f"\x1b[31mHTTPError\x1b[0m: {text}"],
                ),
            ],
        )
        for i, text in enumerate(cells)
    ]
    return dict(cells=made, metadata=metadata, nbformat=4, nbformat_minor=5)


@pytest.fixture(scope="module")
def planted(tmp_path_factory, server):
    "A run of the data stage from a guarded address, with secrets wherever one could put one."
    secrets = [*ENVIRONMENT.values(), *SHAPED.values()]
    with pytest.MonkeyPatch.context() as m:
        home = tmp_path_factory.mktemp("home")
        variables = ENVIRONMENT | dict(
            HOME=str(home),
            MEDFT_CACHE=str(home / "cache"),
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
        )
        for k, v in variables.items():
            m.setenv(k, v)
        for k in [k for k in os.environ if k.startswith("MEDFT_URL")]:
            m.delenv(k)
        signature = f"X-Amz-Signature={SIGNATURE}&X-Amz-Credential=AKIA"
        url = f"http://anna:{PASSWORD}@{server}/rows.jsonl?{signature}"
        recipe = load_recipe(
            "your_data",
            [
                f"dataset.path={url}",
                "engine=trl",
                "model.name=tiny-base",
                "dataset.checks.truncated=off",
                "training.max_length=512",
                "tracking.mlflow=false",
                "dataset.cache=false",
                f"tracking.uri=https://anna:{PASSWORD}@mlflow.example.org",
                "description=" + json.dumps("made with " + " and ".join(secrets)),
            ],
        )
        run = Run.create(
            recipe,
            root=tmp_path_factory.mktemp("runs"),
            run_id="made",
            command=f"medft run your_data dataset.path={url} {SHAPED['option']}",
        )
        frozen = Run.open(run.path)  # as the kernel of a stage sees it
        data.prepare(frozen)
        with run.stage("train"):
            pass
        for text in secrets:
            run.log(f"asked with {text}", show=False)
        run.update(
            dict(
                status="failed", stages=dict(train=dict(status="failed", reason=" ".join(secrets)))
            )
        )
        write_json(
            run.path / "metrics.json",
            dict(verdict=dict(trl=dict(label="tie", sentence=secrets[3]))),
        )
        write_json(run.path / "plan.json", dict(notes=secrets, config={"password": "tinypass1"}))
        for name in ("kernel.log", "plan.log", "track.log"):
            (run.path / "logs" / name).write_text("\n".join([*secrets, url]))
        page = run.path / "notebooks/01_data.ipynb"
        page.parent.mkdir()
        page.write_text(json.dumps(executed([*secrets, url]), indent=1))
        runner.take_out_secrets(run, page)
        from medft.export.publish import training_env

        atomic_write(run.path / "training.env", training_env(frozen.recipe))
        yield SimpleNamespace(
            run=run,
            frozen=frozen,
            url=url,
            public=f"http://{server}/rows.jsonl",
            secrets=secrets,
            client=mirrored(run, track.tracking_uri(frozen.recipe)),
            uri=track.tracking_uri(frozen.recipe),
        )


def secret_parts(secrets):
    return [
        (s if "\n" not in s and "://" not in s and s in ENVIRONMENT.values() else secret_part(s))
        for s in secrets
    ] + [PASSWORD, SIGNATURE, "tinypass1"]


def test_no_file_of_a_run_holds_a_planted_secret(planted):
    files = [p for p in planted.run.path.rglob("*") if p.is_file()]
    names = {p.relative_to(planted.run.path).as_posix() for p in files}
    assert names >= {
        "recipe.yaml",
        ".recipe.yaml",
        "manifest.json",
        "data/report.json",
        "logs/finetune.log",
        "logs/plan.log",
        "notebooks/01_data.ipynb",
        "plan.json",
        "training.env",
        "metrics.json",
    }
    wrong = [
        (p.relative_to(planted.run.path).as_posix(), h)
        for p in files
        for h in secret_parts(planted.secrets)
        if h.encode() in p.read_bytes()
    ]
    assert wrong == []
    json.loads((planted.run.path / "notebooks/01_data.ipynb").read_text())
    assert "asked with" in (planted.run.path / "logs/finetune.log").read_text()


def test_nothing_secret_is_sent_to_a_tracker(planted):
    everything = json.dumps(planted.client.sent, default=str) + json.dumps(planted.client.files)
    assert [h for h in secret_parts(planted.secrets) if h in everything] == []
    assert (
        "recipe.yaml" in planted.client.files
        and planted.public in planted.client.files["recipe.yaml"]
    )
    assert PASSWORD in planted.uri, "the tracker itself still gets its password"


def test_the_run_works_from_memory_and_files_hold_the_public_form(planted):
    assert (
        planted.frozen.recipe.dataset.path == planted.public
        and planted.run.recipe.dataset.path == planted.url
    )
    assert read_json(planted.run.path / "data/report.json")["rows_in"] == 40
    assert planted.run.manifest["without_credentials"] == [
        planted.public,
        "https://mlflow.example.org",
    ]
    assert planted.frozen.recipe.digest() == planted.run.manifest["digest"]


def test_a_resumed_run_takes_the_address_again_or_says_what_it_needs(
    planted, tmp_path, monkeypatch
):
    run = Run.create(planted.run.recipe, root=tmp_path, run_id="broken")
    kept = {k: os.environ[k] for k in list(os.environ) if k.startswith("MEDFT_URL")}
    for k in kept:
        monkeypatch.delenv(k)
    with pytest.raises(MedftError, match="password or signature.*dataset.path=URL.*MEDFT_URL") as e:
        runner.resumed(Run.open(run.path))
    assert (
        "\n" not in str(e.value) and planted.public in str(e.value) and PASSWORD not in str(e.value)
    )
    with pytest.raises(MedftError, match="access refused.*MEDFT_URL") as e:
        sources.source_parts(planted.public)
    monkeypatch.setenv("MEDFT_URL", planted.url)
    again = runner.resumed(Run.open(run.path))
    assert again.recipe.dataset.path == planted.public and sources.source_parts(
        again.recipe.dataset.path
    )
    monkeypatch.delenv("MEDFT_URL")
    again = runner.resumed(Run.open(run.path), [f"dataset.path={planted.url}"])
    assert "changes" not in again.manifest and sources.source_parts(again.recipe.dataset.path), (
        "the same address is no change of the recipe"
    )
    for k in [k for k in os.environ if k.startswith("MEDFT_URL_")]:
        monkeypatch.delenv(k)
    run.update(dict(stages=dict(data=dict(status="finished"))))
    assert runner.resumed(Run.open(run.path)), "rows that are there need no password"


# ---- rows of patients ----
def scored(tmp_path, report, *overrides):
    "A run with files that hold rows."
    run = Run.create(
        load_recipe("quickstart", ["engine=trl", *overrides]), root=tmp_path, run_id="made"
    )
    write_json(run.path / "data/report.json", report)
    for name, text in {
        "notebooks/01_data.ipynb": '{"cells": []}',
        "data/split.json": '{"test": ["patient-77"]}',
        "README.md": "# card",
        "report.html": '<article class="card">Anna</article>',
        "predictions/trl.test.parquet": "x",
    }.items():
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text(text)
    run.log("data: first row: Anna Muster, born 1950", show=False)
    run.log("data: check identifiers: 1 rows, e.g. patient-77", show=False)
    run.update(dict(status="finished"))
    return run


FOUND = dict(
    checks=dict(identifiers=dict(count=2, action="warn", ids=["patient-77"])),
    shapes=dict(train="medmcqa"),
)
CLEAN = dict(
    checks=dict(identifiers=dict(count=0, action="warn", ids=[])), shapes=dict(train="medmcqa")
)
PAIRS = CLEAN | dict(shapes=dict(train="entity-pairs"))


@pytest.mark.parametrize(
    "report, overrides, shown",
    [
        (CLEAN, [], True),
        (FOUND, [], False),
        (PAIRS, [], False),
        (CLEAN | dict(shapes=dict(train="medmcqa", extra="text, patient")), [], False),
        (FOUND, ["evaluation.show_items=true"], True),
        (CLEAN, ["evaluation.show_items=false"], False),
        (CLEAN, ["dataset.checks.identifiers=off"], True),
        (dict(checks={}), ["dataset.checks.identifiers=off"], False),
        (dict(checks=dict(identifiers=dict(count=2, dropped=2, action="warn"))), [], True),
        (dict(rows_in=3, identifiers={"name": 1}), [], False),
        (dict(rows_in=3, identifiers={"public url": 4}), [], True),
    ],
)
def test_single_items_are_shown_by_one_rule(tmp_path, report, overrides, shown):
    run = Run.create(load_recipe("quickstart", overrides), root=tmp_path, run_id="made")
    assert why_hidden(run) or "evaluation.show_items=true" in overrides, "no report, no rows"
    write_json(run.path / "data/report.json", report)
    assert (not why_hidden(run)) is shown


ROW_FILES = {"notebooks/01_data.ipynb", "data/split.json", "report.html"}


@pytest.mark.parametrize(
    "uri", ["https://me:pw123456@mlflow.example.org/x", "http://127.0.0.1:5000", "databricks"]
)
def test_rows_stay_here_where_they_are_hidden(tmp_path, uri):
    run = scored(tmp_path, FOUND)
    client = mirrored(run, uri)
    assert not ROW_FILES & set(client.files)
    others = {"README.md", "recipe.yaml", "manifest.json", "data/report.json", "logs/finetune.log"}
    assert others <= set(client.files)
    assert not [f for f, text in client.files.items() if "Anna" in text or "patient-77" in text]
    log = (run.path / "logs/finetune.log").read_text().splitlines()
    (line,) = [line for line in log if "tracking: sent to" in line]
    assert host_of(uri) in line and "README.md" in line
    assert "pw123456" not in line
    assert "notebooks/01_data.ipynb" in line.partition("stay here")[2]
    mirrored(run, uri)
    assert (run.path / "logs/finetune.log").read_text().count("tracking: sent to") == 1


def test_rows_are_sent_where_they_may_be_shown(tmp_path):
    run = scored(tmp_path, FOUND, "evaluation.show_items=true")
    client = mirrored(run, "https://mlflow.example.org")
    assert set(client.files) >= ROW_FILES
    assert "stay here" not in (run.path / "logs/finetune.log").read_text()


def test_a_local_store_gets_everything_unless_its_artifacts_are_elsewhere(tmp_path):
    run = scored(tmp_path, PAIRS)
    client = mirrored(run, f"sqlite:///{tmp_path}/mlflow.db")
    assert set(client.files) >= ROW_FILES
    assert "tracking: sent" not in (run.path / "logs/finetune.log").read_text()
    client = mirrored(run, f"sqlite:///{tmp_path}/other.db", artifact_uri="s3://bucket/artifacts")
    assert not ROW_FILES & set(client.files)


@pytest.mark.parametrize("shown", [True, False])
def test_the_report_shows_items_or_says_why_not(tmp_path, shown):
    from medft.evaluate.metrics import read_predictions
    from medft.export.report import items_section, report

    from test_report import made_run

    run, metrics = made_run(tmp_path, engines=("trl",), prompt="Anna Muster asks about")
    write_json(
        run.path / "data/report.json",
        read_json(run.path / "data/report.json") | (CLEAN if shown else FOUND),
    )
    page = report(run, metrics, {})
    assert ("Anna Muster" in page) is shown and ('<article class="card">' in page) is shown
    if not shown:
        assert "Single items are not shown: what may identify somebody was found in 2 rows" in page
    assert items_section(run, metrics, read_predictions(run) if shown else None)


@pytest.mark.parametrize(
    "stage, cell", [("01_data", "d003"), ("01_data", "c040"), ("02_model", "m007")]
)
def test_front_pages_ask_before_they_show_a_row(stage, cell):
    page = json.loads((TOP / f"nbs/{stage}.ipynb").read_text())
    source = next("".join(c["source"]) for c in page["cells"] if c.get("id") == cell)
    for hidden in ("the data are records", ""):
        output = shown_by(source, hidden)
        assert ("Anna" in output) is (not hidden)
        assert not hidden or "the data are records" in output


def shown_by(source, hidden):
    "What a cell shows of a row of Anna's; `hidden`: why rows are hidden, or nothing."
    output = []
    this = SimpleNamespace(
        log=lambda line, show=True: output.append(line),
        recipe=SimpleNamespace(task="generative"),
        path=Path("nowhere"),
    )
    tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids: "Anna")
    row = dict(prompt="Anna", completion="Anna", input_ids=[1, 2])
    names = dict(
        why_hidden=lambda run: hidden,
        this=this,
        report=dict(max_length=8),
        item=row,
        answer="Anna",
        pd=pd,
        printable=lambda value, limit: str(value),
        first_rows=lambda run: [row],
        load_split=lambda run, name: [row],
        load_tokenizer=lambda r: tokenizer,
        sample_text=lambda *a: "Anna",
        show_sample=lambda *a: "Anna",
        HTML=str,
        display=output.append,
        print=lambda *a: output.append(" ".join(map(str, a))),
    )
    exec(source, names)
    return " ".join(map(str, output))


# ---- permissions, .env, the card ----
@pytest.mark.parametrize(
    "mask, mode", [(0o077, 0o600), (0o022, 0o644), (0o027, 0o640), (0o002, 0o664)]
)
def test_files_honour_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        atomic_write(tmp_path / "a.txt", "a")
        write_json(tmp_path / "b.json", {})
        redaction.redact_file(tmp_path / "a.txt")
        assert os.umask(mask) == mask, "asking for it does not change it"
        run = Run.create(load_recipe("quickstart"), root=tmp_path, run_id="made")
    finally:
        os.umask(before)
    for path in (
        tmp_path / "a.txt",
        tmp_path / "b.json",
        run.path / "recipe.yaml",
        run.path / "manifest.json",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_dotenv_gives_credentials_and_settings_and_nothing_else(tmp_path, monkeypatch, capsys):
    refused = """
        MEDFT_NOTEBOOKS MEDFT_TCMALLOC PATH LD_PRELOAD LD_LIBRARY_PATH PYTHONPATH
        PYTHONSTARTUP HOME BASH_ENV GIT_SSH_COMMAND CXX AWS_CONFIG_FILE IPYTHONDIR
        JUPYTER_PATH
    """.split()
    taken = """
        HF_TOKEN WANDB_API_KEY MLFLOW_TRACKING_URI MLFLOW_TRACKING_PASSWORD
        AWS_DEFAULT_REGION AWS_ACCESS_KEY_ID MEDFT_URL MEDFT_RUNS KAGGLE_USERNAME
        HTTPS_PROXY
    """.split()
    for name in (*refused, *taken):
        if name not in ("PATH", "HOME", "PYTHONPATH"):
            monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / ".env").write_text(
        "".join(f"{name}=/planted/{name.lower()}\n" for name in (*refused, *taken))
    )
    monkeypatch.chdir(tmp_path)
    assert redaction.load_env() == refused
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(name in err for name in refused) and "planted" not in err
    assert all(os.environ.get(name) == before.get(name) for name in refused)
    assert all(os.environ[name] == f"/planted/{name.lower()}" for name in taken)


def test_the_card_says_what_was_not_checked(tmp_path):
    from medft.export import model_card as card

    from test_report import made_run

    run, metrics = made_run(tmp_path, engines=("trl",))

    def text():
        return card.model_card(run, metrics, {})

    assert "was not checked" in text() and "this was checked before scoring" not in text()
    run.update(dict(unchecked=[]))
    assert "this was checked before scoring" in text()
    assert "Not checked: no file was read back" in text()
    assert "answered the test set again" not in text()
    run.update(dict(unchecked=["not checked: what other was trained on is not known"]))
    assert "Not checked: what other was trained on is not known." in text()


@pytest.mark.long
def test_a_whole_run_with_export_holds_no_secret(tmp_path, server):
    from stages import medft

    held = ENVIRONMENT | dict(
        HF_HUB_OFFLINE="1",
        MEDFT_CACHE=str(tmp_path / "cache"),
        HOME=str(tmp_path),
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )
    url = f"http://anna:{PASSWORD}@{server}/rows.jsonl?X-Amz-Signature={SIGNATURE}"
    done = medft(
        tmp_path,
        "run",
        "your_data",
        f"dataset.path={url}",
        "engine=[trl]",
        "model.name=tiny-base",
        "training.max_steps=2",
        "training.max_length=512",
        "dataset.checks.truncated=off",
        "dataset.holdout=0.2",
        f"description=made with {SHAPED['hub']}",
        "--run-dir",
        "run",
        MEDFT_NOTEBOOKS=str(TOP / "nbs"),
        timeout=1200,
        **held,
    )
    assert done[0] == 0, done
    hidden = [PASSWORD, SIGNATURE, SHAPED["hub"], *ENVIRONMENT.values()]
    assert [
        (p, h)
        for p in tmp_path.rglob("*")
        if p.is_file()
        for h in hidden
        if h.encode() in p.read_bytes()
    ] == []
    assert (tmp_path / "run/report.html").exists() and (tmp_path / "run/README.md").exists()
