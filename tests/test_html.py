"""report/html.py: what its page holds is what the decoders write, and a browser shows it."""
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import scripts
import train_ar
import train_cft
from conftest import ROOT, close
from data import LABEL, PAD, parse_answers, tensors
from model import ar_decode
from plumbing.arguments import parse_args
from plumbing.checkpoint import finished_stages
from report import html as page
from sampler import Threshold
from trainer import decode, load_world

BLOCK = 8  # blocks of the page's student
OWN = ("--trace", "free", "--block_size", str(BLOCK))


def run(module, monkeypatch, folder, *options):
    scripts.run(module, monkeypatch, folder, *OWN, *options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a teacher, a student and their page."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (train_ar, train_cft, page):
            run(module, monkeypatch, folder)
    return folder


def text_of(folder):
    with open(os.path.join(folder, "toy", "decode.html"), encoding="utf-8") as file:
        return file.read()


def data_of(text):
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert len(found) == 1

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")
    return json.loads(found[0], parse_constant=refuse)


@pytest.fixture(scope="module")
def data(made):
    return data_of(text_of(made))


@pytest.fixture(scope="module")
def run_of(made):
    """The settings, the world and the models that the page was made from."""
    cfg = parse_args("", [*scripts.TINY, *OWN, "--run_dir", str(made)])
    world = load_world(cfg)
    found = finished_stages(cfg, world)
    return cfg, world, {stage: model for stage, (model, _) in found.items()}


def responses(data):
    """[(user, student or "ar", tau, response)]"""
    for user in data["users"]:
        yield user, "ar", None, user["ar"]
        for stage, taus in user["students"].items():
            for tau, response in taus.items():
                yield user, stage, float(tau), response


# --- What it holds ----------------------------------------------------------------------------

def test_the_page_holds_what_the_decoders_write(data, run_of):
    cfg, world, models = run_of
    assert data["stages"] == ["naive", "cft"] and data["taus"] == [0.3, 0.9]
    assert [user["number"] for user in data["users"]] == [1, 2, 3]
    count = 0
    for user, stage, tau, response in responses(data):
        n = user["number"] - 1
        prompt, _ = tensors(world.test, range(n, n + 1), "cpu")
        if stage == "ar":
            tokens = ar_decode(models["ar"], prompt, world.max_response)[0][0]
        else:
            model = models["ar" if stage == "naive" else stage]
            decoded = decode(cfg, model, prompt, world.max_response, tau)
            tokens = decoded.tokens[0]
            assert len(response["top"]) == len(response["ends"]) == int(decoded.forwards)
            length = len(response["step"])
            assert response["step"] == decoded.commit_step[0, :length].tolist()
        written = tokens[tokens != PAD].tolist()
        assert [data["words"][i] for i in response["tokens"]] == [world.words[t] for t in written]
        assert response["ends"] == sorted(response["ends"])
        answers = parse_answers(np.array([written]), world.test.incoming[n:n + 1])
        assert [data["words"][i] for i in response["order"]] == [
            world.words[LABEL + label] for label in answers.order[0]]
        assert response["valid"] == answers.valid[0]
        count += 1
    assert count == 3 * (1 + 2 * 2)


def test_the_prompt_is_readable(data, run_of):
    _, world, _ = run_of
    for user in data["users"]:
        n = user["number"] - 1
        said = [data["words"][i] for item in user["history"] for i in item]
        said += [data["words"][i] for item in user["candidates"] for i in item]
        shown = [world.words[token] for token in world.test.prompt[n] if token != PAD]
        assert said == [word for word in shown if not word.startswith("<")]
        assert all(len(item) == 3 for item in user["history"])
        assert data["words"][user["target"]] == world.words[LABEL + world.test.target[n]]


def test_probabilities_are_those_of_open_slots(data):
    for _, stage, _, response in responses(data):
        if stage == "ar":
            continue
        forward, begins = response["forward"], set()
        for number, slots in enumerate(response["top"]):
            assert slots
            for slot, *best in slots:
                tokens, thousandths = best[::2], best[1::2]
                assert len(tokens) == len(set(tokens)) == 5
                assert thousandths == sorted(thousandths, reverse=True)
                assert 0 <= min(thousandths) and sum(thousandths) <= 1000
                assert slot < response["slots"]
                if slot < len(forward):
                    assert forward[slot] >= number  # it was open
                    if forward[slot] == number:  # greedily: the most likely token
                        assert response["tokens"][slot] == tokens[0]
            begins.add(min(slot for slot, *_ in slots) // BLOCK)
            looked_at = {slot for slot, *_ in slots}
            written = {slot for slot, when in enumerate(forward) if when == number}
            assert written <= looked_at
        assert begins == set(range(response["slots"] // BLOCK))


def test_the_plain_code_writes_the_same_page(data, made, monkeypatch):
    run(page, monkeypatch, made, "--fast", "false")
    plain = data_of(text_of(made))
    for (_, _, _, a), (_, _, _, b) in zip(responses(data), responses(plain), strict=True):
        for name in ("tokens", "step", "forward", "untrue", "wrong", "order", "valid"):
            assert a[name] == b[name]
        for quick, slow in zip(a.get("top", []), b.get("top", []), strict=True):
            for one, other in zip(quick, slow, strict=True):
                assert np.abs(np.array(one[2::2]) - other[2::2]).max() <= 1  # thousandths


def test_a_recorder_chooses_as_its_rule():
    logp = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    open_ = torch.tensor([[True, False, True, True]])
    forced = torch.tensor([[True, False, False, False]])
    rule = page.Recorder(Threshold(0.2))
    chosen = rule.choose(logp, open_, forced)
    assert torch.equal(chosen, Threshold(0.2).choose(logp, open_, forced))
    assert list(rule.forwards[0]) == [0, 2, 3]
    for slot, best in rule.forwards[0].items():
        for token, p in best:
            close(logp[0, slot, token].exp(), torch.tensor(p), atol=1e-6)


# --- One file, without a network --------------------------------------------------------------

def test_the_page_is_one_file_that_asks_nobody(made):
    text = text_of(made)
    for asks in ("http://", "https://", "src=", "href=", "@import", "url(", "fetch("):
        assert asks not in text
    assert len(text.encode()) < 600_000
    assert page.MARK not in text


def test_words_of_the_data_stay_data():
    word = "</script><script>alert(1)</script><!-- \u2028 日本"
    assert data_of(page.page_of({"words": [word]})) == {"words": [word]}


def test_users_can_be_chosen_and_their_number_is_checked(made, monkeypatch, capsys):
    run(page, monkeypatch, made, "--user", "16", "--users", "2", "--taus", "1.0")
    found = data_of(text_of(made))
    assert [user["number"] for user in found["users"]] == [16]
    assert found["taus"] == [0.9, 1.0]
    message = scripts.refused(page, monkeypatch, capsys, made, "--user", "17", *OWN)
    assert "there are 16 test users" in message
    assert "train_cft.py" in scripts.refused(page, monkeypatch, capsys, made / "none")


def test_as_a_script_it_does_not_hide_pythons_own_html(made):
    code = subprocess.run(
        [sys.executable, os.path.join(ROOT, "report", "html.py"), *scripts.TINY, *OWN,
         "--run_dir", str(made)], capture_output=True, text=True, cwd=made)
    assert code.returncode == 0, code.stderr
    assert "decode.html: ar, cft" in code.stdout
    import html
    assert html.escape("<") == "&lt;"


# --- In a browser -----------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
browser = pytest.mark.skipif(not BROWSER, reason="there is no chromium to look at the page with")

# What a reader does, at the end of the page; what is then seen, as JSON in <pre id="seen">.
DRIVE = """
<script>
{
const seen = {errors: []};
addEventListener("error", event => seen.errors.push(event.message));
const press = key => document.body.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true}));
const words = box => [...document.querySelectorAll(box + " .cell:not(.open):not(.unused)")]
  .map(cell => cell.children[1].textContent);
seen.atFirst = words("#student");
press("ArrowRight");
seen.afterOne = [state.step, words("#student").length + words("#ar").length];
press("ArrowLeft");
seen.back = [state.step, words("#student").length];
press(" ");
seen.playing = state.playing;
press("ArrowRight");
seen.stopped = !state.playing;
goTo(10 ** 6);
seen.student = words("#student");
seen.ar = words("#ar");
const cell = document.querySelector("#student .cell");
cell.dispatchEvent(new Event("focus"));
seen.bars = document.querySelectorAll("#thoughts .bar").length;
seen.thought = document.querySelector("#thoughts code").textContent;
seen.label = cell.getAttribute("aria-label");
seen.signs = [...document.querySelectorAll("#student .cell .sign")]
  .map(sign => sign.textContent).join("");
document.querySelector("input[value=naive]").click();
seen.naive = words("#student");
document.getElementById("theme").click();
seen.theme = [document.documentElement.dataset.theme,
              getComputedStyle(document.body).backgroundColor];
seen.overflow = document.documentElement.scrollWidth - innerWidth;
document.body.append(Object.assign(document.createElement("pre"),
  {id: "seen", textContent: JSON.stringify(seen)}));
}
</script>"""


def chromium(folder, url, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={folder}/profile", "--virtual-time-budget=2000", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_and_obeys_its_keys(data, tmp_path, width):
    file = tmp_path / "page.html"
    file.write_text(page.page_of(data).replace("</body>", DRIVE + "</body>"), encoding="utf-8")
    out = chromium(tmp_path, f"file://{file}", "--dump-dom", f"--window-size={width},844")
    import html
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', out, re.S)[1]))

    user = data["users"][0]
    cft, naive = user["students"]["cft"]["0.9"], user["students"]["naive"]["0.9"]

    def words(response):
        return [data["words"][token] for token in response["tokens"]]
    assert seen["errors"] == [] and seen["atFirst"] == [] and seen["back"] == [0, 0]
    assert seen["afterOne"][0] == 1 and seen["afterOne"][1] > 0
    assert seen["playing"] and seen["stopped"]
    assert seen["student"] == words(cft) and seen["ar"] == words(user["ar"])
    assert seen["naive"] == words(naive)
    assert seen["bars"] == 5 and seen["thought"] == words(cft)[0]
    assert seen["label"].startswith(f"slot 1: {words(cft)[0]}, step 1")
    assert seen["signs"].count("✗") <= len(cft["untrue"])
    assert bool(seen["signs"]) == bool(cft["untrue"] or cft["wrong"])
    assert seen["theme"] == ["dark", "rgb(21, 23, 27)"] and seen["overflow"] <= 0


@browser
def test_the_themes_look_different(made, tmp_path):
    from PIL import Image
    pixel = {}
    for theme in ("light", "dark"):
        shot = tmp_path / f"{theme}.png"
        url = f"file://{made}/toy/decode.html#theme={theme}&step=5&slot=0"
        chromium(tmp_path, url, f"--screenshot={shot}", "--window-size=390,844")
        with Image.open(shot) as image:
            assert image.size == (390, 844)
            pixel[theme] = image.convert("RGB").getpixel((3, 3))
    assert min(pixel["light"]) > 200 and max(pixel["dark"]) < 60
