"""tools.play: the page's model against torch in a real browser, its verifiers, its advantages, how it is used."""
import base64
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, largest

from lib.countdown import countdown
from lib.toy import COUNTDOWN_SYMBOLS, toy_config
from lib.weights import load_lm, load_tokenizer
from loss import group_advantages
from tools import play

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
COMMITTED = (ROOT / "docs/play.html").read_text()


def in_page(html, tmp_path, script, *flags):
    """Run a script in the page, once it is there -> what it returns, through JSON, and the console's lines."""
    tail = ('const out = document.body.appendChild(document.createElement("pre")); out.id = "out"; '
            'try { out.textContent = JSON.stringify((() => {' + script + '})()) } catch (e) { out.textContent = `"${e}"` }')
    (tmp_path / "page.html").write_text(html.replace("</body>", f'<script nonce="play">{tail}</script></body>'), encoding="utf-8")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not start as root
    done = subprocess.run([CHROMIUM, "--headless", *sandbox, "--disable-gpu", f"--user-data-dir={tmp_path}/user", *flags,
                           "--enable-logging=stderr", "--dump-dom", f"{tmp_path}/page.html"],
                          capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    import html as entities
    return json.loads(entities.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def page_data(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])


def torch_model(data, i):
    """Model number i of a page in torch, from the page's own half-precision weights."""
    from transformers import Qwen2ForCausalLM
    half = torch.from_numpy(np.frombuffer(base64.b64decode(data["models"][i]["weights"]), np.float16).astype(np.float32))
    state = {}
    for name, shape in data["shapes"].items():
        n = int(np.prod(shape))
        state[name], half = half[:n].view(shape), half[n:]
    lm = Qwen2ForCausalLM(toy_config(COUNTDOWN_SYMBOLS)).eval()
    missing, unexpected = lm.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"} and not len(half)
    lm.tie_weights()
    return lm


GREEDY = """return data.prompts.slice(0, 50).map(p => {
  const tokens = generate(model(MODEL), p.ids, null), seen = model(MODEL).start();
  let logits;
  for (const id of [...p.ids, ...tokens.map(t => t.id)]) logits = model(MODEL).step(seen, id);
  return {ids: tokens.map(t => t.id), h: tokens.map(t => t.h), logp: tokens.map(t => t.logp), last: Array.from(logits)};
});"""


@torch.no_grad()
def compare(found, lm, prompts, room):
    """Largest differences of (logits, entropies, log-probs), and how many greedy responses differ."""
    logits, entropies, logps, other = [], [], [], 0
    for got, prompt in zip(found, prompts, strict=False):
        z = lm(torch.tensor([prompt["ids"] + got["ids"]])).logits[0].float()
        lp = z.log_softmax(-1)[len(prompt["ids"]) - 1 : -1]
        logits.append((z[-1] - torch.tensor(got["last"])).abs().max())
        entropies.append((-(lp.exp() * lp).sum(-1) - torch.tensor(got["h"])).abs().max())
        logps.append((lp.gather(-1, torch.tensor(got["ids"])[:, None])[:, 0] - torch.tensor(got["logp"])).abs().max())
        other += lp.argmax(-1).tolist() != got["ids"] or len(got["ids"]) > room
    return largest(logits), largest(entropies), largest(logps), other


@browser
@pytest.mark.parametrize("i", [0, 3])
def test_the_pages_countdown_models_compute_what_torch_computes(tmp_path, i):
    data = page_data(COMMITTED)
    found, console = in_page(COMMITTED, tmp_path, GREEDY.replace("MODEL", str(i)))
    gaps = compare(found, torch_model(data, i), data["prompts"], data["settings"]["max_response_tokens"])
    print(f"{data['models'][i]['name']}: logits {gaps[0]:.1g}, entropy {gaps[1]:.1g} nats, log-probs {gaps[2]:.1g}, "
          f"{gaps[3]} of {len(found)} greedy responses differ")
    assert len(found) == 50 and gaps[0] < 1e-3 and gaps[1] < 1e-4 and gaps[2] < 1e-4 and gaps[3] == 0 and not console


@browser
def test_the_page_of_a_run_is_its_fp32_model_up_to_half_precision(whole, tmp_path):
    data = play.play_data([str(whole)])
    assert [m["name"].split(": ")[-1] for m in data["models"]] == ["base model", "stage1, step 3", "stage2, step 6"]
    found, console = in_page(play.page(data, "…"), tmp_path, GREEDY.replace("MODEL", "0"))
    folder = json.loads((whole / "stages.json").read_text())["stage1"]["model"]
    gaps = compare(found, load_lm(folder, torch.float32, "eager"), data["prompts"], 99)
    print(f"logits {gaps[0]:.1g}, entropy {gaps[1]:.1g} nats, {gaps[3]} of {len(found)} greedy responses differ")
    assert gaps[0] < 5e-2 and gaps[1] < 1e-2 and gaps[3] == 0 and not console
    assert load_tokenizer(folder)[0].decode(found[0]["ids"]).startswith(" ")


TRACES = [" 3*7=21;21+8=29", " 3*7=21;21+8=29;", " 3*7=22;22+8=30", " 3*7=21", " 8-3=5;7*5=35", " 3*3=9;9+8=17", "", " 3+7",
          " 3-8=-5;7--5=12", " 3*7=21; 21+8 =29", " 03*7=21;21+8=29", " 3*7=21;;21+8=29", " ３*7=21;21+8=29"]  # fmt: skip


@browser
def test_the_pages_verifiers_and_advantages_are_the_projects(tmp_path):
    scores = [1, -1, -1, 1, 1, -1, -1]
    script = (f"return {{right: {json.dumps(TRACES)}.map(t => VERIFIERS.countdown(t, '3 7 8 -> 29').right), "
              f"a: advantages({scores}).values, boxed: ['so \\\\boxed{{41}} or \\\\boxed{{42}}', '42'].map(t => "
              "VERIFIERS.boxed(t, '42').right)}")
    found, _ = in_page(COMMITTED, tmp_path, script)
    assert found["right"] == [countdown(t, "3 7 8 -> 29")[0] for t in TRACES] and sum(found["right"]) == 3
    wanted = group_advantages(torch.tensor(scores, dtype=torch.float), torch.zeros(len(scores)))
    assert found["a"] == pytest.approx(wanted.tolist(), abs=1e-6) and found["boxed"] == [True, False]


USE = """
const tokens = () => [...document.querySelectorAll("#bases .tokens")], all = () => [...document.querySelectorAll("body *")];
const key = (at, key) => at.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const out = {heads: document.querySelectorAll("h2").length};
const line = tokens()[1];
line.children[0].focus();
for (let i = 0; i < 5; i++) key(document.activeElement, "ArrowRight");
out.at = document.activeElement.dataset.t;
document.activeElement.click();                            // Enter on a button is a click
out.focus = document.activeElement.dataset.t, out.chosen = page.chosen, out.t = page.bases[1].t;
out.prefixes = page.bases[1].branches.map(b => b.prefix.length);
out.given = document.querySelector("#branches .kept").textContent;
out.wanted = textOf(page.bases[1].tokens.slice(0, 5));
out.rows = document.querySelectorAll("#group tbody tr").length;
[...document.querySelectorAll("#rules button")].pop().click();
out.all = document.querySelectorAll("#group tbody tr").length;
out.models = document.querySelectorAll("#models .tokens").length;
const before = page.bases[0].tokens.map(t => t.id).join();
$("model").value = data.models.length - 1; $("model").dispatchEvent(new Event("input"));
out.named = $("named").textContent, out.other = before !== page.bases[0].tokens.map(t => t.id).join();
// what a checker of accessibility asks: names, labels, contrast, width
out.nameless = [...document.querySelectorAll("button, select, input")].filter(e =>
  !(e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length)).length;
const rgba = text => text.match(/[\\d.]+/g).map(Number);
function behind(e) {
  for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3]) return c; }
  return [255, 255, 255];
}
out.contrast = Math.min(...all().filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) &&
  !["SCRIPT", "OPTION", "STYLE"].includes(e.tagName) && e.id !== "out").map(e => {
  const [a, b] = [rgba(getComputedStyle(e).color), behind(e)].map(c => luminance(c.slice(0, 3)) + .05);
  return Math.max(a, b) / Math.min(a, b);
}));
out.wide = document.documentElement.scrollWidth - innerWidth;
out.dark = matchMedia("(prefers-color-scheme: dark)").matches;
return out;
"""


@browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_used_by_keyboard_fits_a_phone_and_can_be_read(tmp_path, dark):
    flags = ["--window-size=400,900", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    found, console = in_page(COMMITTED, tmp_path, USE, *flags)
    print({k: v for k, v in found.items() if k not in ("given", "wanted")})
    assert (found["at"], found["focus"], found["chosen"], found["t"]) == ("5", "5", 1, 5) and found["prefixes"] == [5, 5, 5]
    assert found["given"] == found["wanted"] and found["rows"] == 4 + 3 and found["all"] == 16
    assert found["models"] == len(page_data(COMMITTED)["models"]) and found["other"] and "dapo" in found["named"]
    assert found["nameless"] == 0 and found["contrast"] >= 4.5 and found["wide"] <= 0 and found["dark"] == dark and not console


@browser
def test_hostile_text_is_only_text(whole, tmp_path):
    data = play.play_data([str(whole)])
    hostile = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    data["tokens"] = [hostile] * len(data["tokens"])
    data["prompts"] = [p | {"text": hostile} for p in data["prompts"]]
    found, _ = in_page(play.page(data, "--> <script>document.title='owned'</script>"), tmp_path,
                       "return [document.title, document.querySelectorAll('img').length, document.querySelectorAll('script').length]")
    assert found == ["CURE by hand", 0, 3]


def test_what_is_no_run_or_no_small_model_is_one_line(whole, tmp_path, capsys, monkeypatch):
    assert play.main([str(tmp_path)]) == 2 and "has no stages.json" in capsys.readouterr().err
    monkeypatch.setattr(play, "LARGEST", 1000)
    assert play.main([str(whole), "--out", str(tmp_path / "p.html")]) == 2
    assert "M parameters, a page takes 0 M" in capsys.readouterr().err and not (tmp_path / "p.html").exists()


def test_the_committed_page_says_how_it_was_made_and_is_of_todays_template():
    assert COMMITTED.split("\n")[1].startswith("<!-- Made by: python -m tools.play runs/countdown runs/countdown-dapo")
    template = (ROOT / "tools/play.html").read_text().split("\n")
    mine = COMMITTED.split("\n")
    assert [a for a, b in zip(template, mine, strict=True) if a != b] == [line for line in template if "__DATA__" in line or "__COMMAND__" in line]
