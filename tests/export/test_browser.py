"""The report in a browser, at the widths of a telephone and a desktop.

All of it is readable, and nothing leaves the page."""

from medft.export import report as rp

import html
import json
import os
import shutil
import subprocess

import pytest
from test_report import NASTY, everything, made_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
WIDTHS = (390, 1280)

MEASURE = """
const overflow = p => getComputedStyle(p).overflowX;
const scrolls = e => {
  for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(overflow(p))) return true;
  return false;
};
const folded = e => {
  const d = e.closest('details');
  return d && !d.open && e.tagName !== 'SUMMARY';
};
const box = e => e.getBoundingClientRect();
const letterSize = e => {
  const svg = e.closest('svg');
  const scale = box(svg).width / svg.viewBox.baseVal.width;
  return parseFloat(getComputedStyle(e).fontSize) * scale;
};
const outside = (t, s) => box(t).left < box(s).left - 2 || box(t).right > box(s).right + 2;
const look = f => {
  const w = f.contentWindow, d = f.contentDocument;
  const all = [...d.body.querySelectorAll('*')].filter(e => box(e).width && !folded(e));
  const leaves = e => (box(e).right > w.innerWidth + 1 || box(e).left < -1) && !scrolls(e);
  const texts = [...d.querySelectorAll('svg text')];
  return {
    page: f.dataset.page,
    width: w.innerWidth,
    scroll: d.documentElement.scrollWidth,
    verdict: box(d.querySelector('.verdict')).bottom,
    verdicts: d.querySelectorAll('.verdict').length,
    letters: Math.min(...texts.filter(e => !folded(e)).map(letterSize)),
    out: all.filter(leaves).map(
      e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40)),
    over: [...d.querySelectorAll('svg')].flatMap(
      s => [...s.querySelectorAll('text')].filter(t => outside(t, s)).map(t => t.textContent)),
    text: d.body.innerText,
  };
};
addEventListener('load', () => {
  const seen = [...document.querySelectorAll('iframe')].map(look);
  document.querySelector('pre').textContent = JSON.stringify(seen);
});
"""


def browse(folder, name, page, *options):
    "Open a page in a headless chromium."
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    root = ["--no-sandbox"] * (os.name == "posix" and os.geteuid() == 0)
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
            *root,
            *options,
            f"file://{folder}/{name}.html",
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    full = made_run(root, run_id="full")
    alone = made_run(root, run_id="alone", engines=(), subjects=())
    many = made_run(
        root,
        run_id="many",
        others=[f"another_model_with_a_long_name_{i}" for i in range(8)],
        subjects=[f"Subject {i} {'long ' * 9}" for i in range(60)],
        n=240,
        prompt=NASTY,
    )
    return dict(
        full=rp.report(full[0], everything(full[1]), {}),
        alone=rp.report(*alone, {}),
        many=rp.report(*many, {}),
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory, pages):
    """Each page in a frame of each width, measured.

    Frames, because chromium's own window is never narrower than 500 px."""
    frames = "".join(
        f'<iframe data-page="{name}" style="width: {w}px; height: 844px; border: 0"'
        f' srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for w in WIDTHS
    )
    out = browse(
        tmp_path_factory.mktemp("seen"),
        "all",
        f"<!doctype html><meta charset=utf-8><pre></pre>{frames}<script>{MEASURE}</script>",
        "--window-size=1400,900",
        "--virtual-time-budget=20000",
        "--dump-dom",
    )
    return json.loads(html.unescape(out[out.index("<pre>") + 5 : out.index("</pre>")]))


def test_nothing_runs_out_of_the_page(seen):
    assert sorted((s["page"], s["width"]) for s in seen) == sorted(
        (p, w) for p in ("alone", "full", "many") for w in WIDTHS
    )
    for s in seen:
        assert s["scroll"] <= s["width"] and not s["out"], (
            s["page"],
            s["width"],
            s["scroll"],
            s["out"][:5],
        )


def test_the_verdict_is_on_the_first_screen_and_the_text_is_there(seen):
    for s in seen:
        assert s["verdict"] < 700, (s["page"], s["width"])
        for words in (
            "Scores",
            "Calibration",
            "Positions",
            "worst",
            "What ran",
            "Recipe",
            "Manifest",
            "stated",
        ):
            assert words in s["text"], (s["page"], words)
    many = [s["text"] for s in seen if s["page"] == "many"]
    assert all("<script>alert(1)</script> ما هو" in t for t in many), (
        "markup in a question is shown, not run"
    )
    assert all("better than the base" in s["text"] for s in seen if s["page"] == "full") and all(
        "No model was compared" in s["text"] for s in seen if s["page"] == "alone"
    )


def test_plots_can_be_read(seen):
    for s in seen:
        assert s["letters"] >= 9.5 and not s["over"], (
            s["page"],
            s["width"],
            s["letters"],
            s["over"][:5],
        )


def test_a_picture_of_it(tmp_path, pages):
    from PIL import Image

    browse(
        tmp_path,
        "full",
        pages["full"],
        "--window-size=1280,900",
        f"--screenshot={tmp_path}/full.png",
    )
    with Image.open(tmp_path / "full.png") as picture:
        assert picture.size == (1280, 900) and len(picture.convert("RGB").getcolors(10**6)) > 50
