"""The page on a merge: it holds everything, its numbers are right, no name in it is markup, a browser shows it."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import loraweld
from fakes import load_folder, save_base
from handmade import MODULES, SHAPES, llama_config, llama_tensors, lora, loras, save_adapter, save_llama
from loraweld.naming.places import kind_of, places
from loraweld.page.changes import MEASURES, TensorChange, cells
from loraweld.page.facts import gather_page_facts
from loraweld.page.render import render
from loraweld.report import MergeReport

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "link", "img", "br", "hr", "input", "image"}
CHROMIUM = Path("/usr/bin/chromium")
needs_chromium = pytest.mark.skipif(
    not CHROMIUM.exists(), reason="NOT SHOWN IN A BROWSER: /usr/bin/chromium is missing (apt-get install chromium)"
)


class Page(HTMLParser):
    """What a page holds: its balance of tags, what it would load, its tables, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th", "button"):
            self.rows[-1][-1] += data.strip()
        if not {"script", "style"} & set(self.open):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def loads(self) -> list[str]:
        """Addresses that a browser would fetch by itself."""
        return [
            value
            for tag, attributes in self.tags
            for name, value in attributes.items()
            if value and (name in ("src", "srcset", "data", "poster") or (name == "href" and tag != "a"))
        ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, an adapter that names it, and the merge of both; it is the current one."""
    monkeypatch.chdir(tmp_path)
    save_llama(Path("base"), num_files=2)
    save_adapter(Path("adapter"), loras(*MODULES), base_model_name_or_path="base")
    loraweld.merge("adapter", output="out")
    return tmp_path


def relative_changes(base: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ‖merged − base‖ / ‖base‖ of each tensor, by numpy in float64."""
    found = {}
    for name, tensor in merged.items():
        new, old = (side.double().numpy() for side in (tensor, base[name]))
        found[name] = float(np.linalg.norm((new - old).ravel()) / np.linalg.norm(old.ravel()))
    return found


def test_the_numbers_are_those_of_float64(place: Path) -> None:
    """Each tensor's change agrees with numpy's, and stands in the table to six digits; what was copied is 0."""
    report = loraweld.report_page("out", output="page.html")
    expected = relative_changes(load_folder(Path("base")), load_folder(Path("out")))
    found = {change.tensor: change.relative_change for change in report.changes}
    assert found == pytest.approx(expected, rel=1e-12)
    assert {name for name, value in found.items() if value} == {f"{module}.weight" for module in MODULES}
    rows = {row[0]: row for row in Page(report.page.read_text()).rows if row}
    for name, value in expected.items():
        assert rows[name][3] == f"{100 * value:.6g} %"
        assert rows[name][2] == " × ".join(map(str, SHAPES[name]))


def test_the_page_loads_nothing_and_is_well_formed(place: Path) -> None:
    """Every tag is closed, nothing is fetched, and the policy in the page forbids that anything is."""
    report = loraweld.report_page("out", output="page.html")
    page = Page(report.page.read_text())
    assert page.loads == []
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy and policy.startswith("default-src 'none'") and "http" not in policy
    assert page.count("h1") == 1 and page.count("h2") >= 5
    assert page.count("table") == page.count("caption")
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "figure")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert set(labelled) <= set(ids)


def test_the_page_says_what_the_record_says(place: Path) -> None:
    """Base, adapter, both hashes, method, version, files and their sizes."""
    record = json.loads(Path("out/loraweld.json").read_text())
    text = Page(loraweld.report_page("out", output="page.html").page.read_text()).text
    (adapter,) = record["adapters"]
    for value in (adapter["name"], adapter["sha256"], adapter["config_sha256"], record["fingerprint"]):
        assert value in text
    assert all(digest in text for digest in record["base"]["headers_sha256"].values())
    assert record["save_method"] in text and loraweld.__version__ in text
    assert all(path.name in text for path in Path("out").iterdir())


def test_hostile_names_are_text(place: Path) -> None:
    """A tensor, an adapter, a note, a file and a module that are markup are shown, never run."""
    tensors = llama_tensors()
    name = f"model.layers.0.{HOSTILE}.weight"
    save_base(Path("hostile"), {**tensors, name: torch.ones(4, 4)}, llama_config())
    Path("made").mkdir()
    save_base(Path("made"), {**tensors, name: torch.full((4, 4), 1.5)}, llama_config())
    record = json.loads(Path("out/loraweld.json").read_text())
    record["adapters"][0]["name"] = record["modules"][0]["what"] = record["base"]["name"] = HOSTILE
    record["notes"] = [HOSTILE]
    Path("made/loraweld.json").write_text(json.dumps(record))
    Path("made/<img src=x onerror=alert(1)>.txt").write_text("")
    report = loraweld.report_page("made", base="hostile", output="page.html")
    text = report.page.read_text()
    assert "<script>alert" not in text and "<img" not in text
    page = Page(text)
    assert page.text.count(HOSTILE) >= 4
    rows = {row[0]: row for row in page.rows if row}
    assert rows[name][3] == "50 %"


def test_without_a_base_the_page_shows_what_is_known(place: Path) -> None:
    """No base beside the output: the page says so and lists record, tensors and files without numbers."""
    shutil.move("base", "elsewhere")
    report = loraweld.report_page("out", output="page.html")
    assert "give it with --base" in report.reason
    page = Page(report.page.read_text())
    assert "Nothing was compared" in page.text and page.count("figure") == 0
    assert {change.relative_change for change in report.changes} == {None}
    again = loraweld.report_page("out", base="elsewhere", output="page.html", overwrite=True)
    assert again.reason == "" and any(change.relative_change for change in again.changes)


def test_a_folder_of_the_bases_name_that_is_not_the_base_is_not_taken(place: Path) -> None:
    """Headers decide: another model beside the output is no base, and as --base it is compared with a warning."""
    shutil.rmtree("base")
    save_llama(Path("base"), torch.float32)
    assert loraweld.report_page("out", output="page.html").reason
    loraweld.report_page("out", base="base", output="page.html", overwrite=True)
    assert "other files than the one that was merged" in Page(Path("page.html").read_text()).text


def test_a_base_in_the_hubs_cache_is_found_at_its_commit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the network: the record has name and commit, the cache has the snapshot or has not."""
    commit = "5e1" + "0" * 37
    cache = place / "cache" / "models--org--base"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    record = json.loads(Path("out/loraweld.json").read_text())
    record["base"] |= {"name": "org/base", "commit": commit}
    Path("out/loraweld.json").write_text(json.dumps(record))
    assert "org/base, is not on this machine" in loraweld.report_page("out", output="page.html").reason
    (cache / "snapshots").mkdir(parents=True)
    shutil.copytree("base", cache / "snapshots" / commit)
    found = loraweld.report_page("out", output="page.html", overwrite=True)
    assert found.reason == "" and any(change.relative_change for change in found.changes)


def test_quantised_outputs_are_compared_as_they_decode(place: Path) -> None:
    """The change of an encoded weight is that of its decoded values: the codes' error is in it."""
    loraweld.merge("adapter", output="fp8", save_method="merged_fp8")
    found = {c.tensor: c.relative_change for c in loraweld.report_page("fp8", output="page.html").changes}
    plain = {c.tensor: c.relative_change for c in loraweld.report_page("out", output="other.html").changes}
    assert found.keys() == plain.keys()
    name = f"{MODULES[0]}.weight"
    assert found[name] != plain[name] and found[name] == pytest.approx(plain[name], rel=0.1)


def test_what_has_no_number_says_why(place: Path) -> None:
    """A resized, a new and a formerly empty tensor, and another count of layers."""
    tensors = llama_tensors()
    old = {**tensors, "model.layers.0.empty.weight": torch.zeros(2, 2), "model.none.weight": torch.zeros(4, 0)}
    new = {**tensors, "model.layers.0.empty.weight": torch.ones(2, 2), "model.new.weight": torch.ones(3)}
    new["model.none.weight"] = torch.zeros(4, 0, dtype=torch.bfloat16)
    new["lm_head.weight"] = torch.ones(44, 16, dtype=torch.bfloat16)
    save_base(Path("old"), old, llama_config())
    save_base(Path("new"), new, llama_config())
    report = loraweld.report_page("new", base="old", output="page.html")
    notes = {change.tensor: change.note for change in report.changes if change.relative_change is None}
    assert notes == {
        "lm_head.weight": "shape 40 × 16 and 44 × 16",
        "model.layers.0.empty.weight": "was zero",
        "model.new.weight": "not in the base",
    }
    assert "no loraweld.json" in Page(report.page.read_text()).text
    save_base(Path("deep"), {**new, "model.layers.2.mlp.weight": torch.ones(2)}, llama_config())
    assert "3" in loraweld.report_page("deep", base="old", output="page.html", overwrite=True).reason


@pytest.mark.parametrize(
    "damage",
    [
        {"adapters": [1]},
        {"adapters": {}},
        {"base": []},
        {"notes": "x"},
        {"modules": [[]]},
        {"base": {"headers_sha256": 3}},
    ],
    ids=str,
)
def test_a_record_of_other_types_is_refused(place: Path, damage: dict[str, object]) -> None:
    record = json.loads(Path("out/loraweld.json").read_text()) | damage
    Path("out/loraweld.json").write_text(json.dumps(record))
    with pytest.raises(loraweld.CheckpointError, match=f"wrong types of {next(iter(damage))}"):
        loraweld.report_page("out", output="page.html")
    assert not Path("page.html").exists()


def test_weights_and_notes_of_a_combination_are_shown(place: Path) -> None:
    """Two adapters at their weights, and the method."""
    save_adapter(Path("other"), loras(*MODULES, rank=2), base_model_name_or_path="base")
    loraweld.merge(["adapter", "other"], output="both", weights=[0.75, -0.5])
    page = Page(loraweld.report_page("both", output="page.html").page.read_text())
    assert [row[:2] for row in page.rows if row[:1] in (["adapter"], ["other"]) and len(row) == 4] == [
        ["adapter", "0.75"],
        ["other", "-0.5"],
    ]


def test_gguf_files_alone_are_listed(place: Path) -> None:
    """An output without weights that are read has a page of its record and files."""
    record = {**json.loads(Path("out/loraweld.json").read_text()), "save_method": "gguf", "gguf_types": ["q8_0"]}
    Path("packed").mkdir()
    Path("packed/loraweld.json").write_text(json.dumps(record))
    Path("packed/packed-Q8_0.gguf").write_bytes(b"GGUF")
    report = loraweld.report_page("packed", output="page.html")
    assert report.changes == () and "packed-Q8_0.gguf" in Page(report.page.read_text()).text


def test_pages_take_numbers_that_others_measured(place: Path) -> None:
    """What an encoding kept and added is shown where it was measured, and not where it was not."""
    facts = gather_page_facts("out", base=None)
    change = TensorChange(
        tensor="a.0.b.weight", layer=0, module="b.weight", shape=(2, 2), relative_change=0.25, kept=0.5, error=0.125
    )
    page = Page(render(facts, [change]))
    row = next(row for row in page.rows if row and row[0] == "a.0.b.weight")
    assert row[3:6] == ["25 %", "50 %", "12.5 %"]
    shutil.move("adapter", "elsewhere")
    assert "Kept" not in Page(loraweld.report_page("out", base="base").page.read_text()).text


# What is left of the adapter's change


def table(page: Page) -> dict[str, dict[str, str]]:
    """Return the table of tensors: by name, by heading."""
    head = next(row for row in page.rows if row[:1] == ["Tensor"])
    rows = [row for row in page.rows if len(row) == len(head) and row is not head]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_the_page_has_the_numbers_of_verify(place: Path) -> None:
    """The adapter beside the output is found by its hash; each number stands in the table, all together on top."""
    proof = loraweld.verify("out", base="base", adapter="adapter")
    report = loraweld.report_page("out", output="page.html")
    assert report.proof is not None and report.proof.tensors == proof.tensors
    page = Page(report.page.read_text())
    rows = table(page)
    for result in proof.tensors:
        left, row = result.retention, rows[result.tensor]
        assert left is not None and left.lost is not None
        ratios = {
            "Change": result.sums.moved_share,
            "Intended change": left.change,
            "Kept": left.kept,
            "Error of the change": left.error,
            "Rounded away": left.lost,
            "Error of the weight": result.relative_error,
        }
        assert {label: row[label] for label in ratios} == {key: f"{100 * v:.6g} %" for key, v in ratios.items()}
        assert row["Cosine"] == f"{left.cosine:.8g}"
    assert rows["model.norm.weight"]["Change"] == "0 %" and rows["model.norm.weight"]["Kept"] == "–"
    assert "The model is base + adapter" in page.text and str(place) not in page.text
    assert proof.total is not None
    assert f"{proof.total.kept:.2%}" in page.text and f"{proof.total.cosine:.6f}" in page.text
    meanings = [measure.meaning for measure in MEASURES if measure.label in rows["model.norm.weight"]]
    assert len(meanings) == 7 and all(page.text.count(meaning) == 2 for meaning in meanings)


def test_adapters_that_are_elsewhere_or_others_are_not_taken(place: Path) -> None:
    """One of the same name with another hash is not; given by its path it is, and any other is refused a verdict."""
    shutil.move("adapter", "elsewhere")
    other = save_adapter(Path("adapter"), loras(*MODULES, rank=2), base_model_name_or_path="base")
    report = loraweld.report_page("out", output="page.html")
    assert report.proof is None and "--adapter" in report.unproven
    text = Page(report.page.read_text()).text
    assert "not known" in text and "--adapter" in text and "Kept" not in text
    given = loraweld.report_page("out", adapter="elsewhere", output="page.html", overwrite=True)
    assert given.proof is not None and given.proof.holds
    wrong = loraweld.report_page("out", adapter=other, output="page.html", overwrite=True)
    assert wrong.proof is not None and not wrong.proof.holds
    page = Page(wrong.page.read_text())
    assert "The model is not base + adapter" in page.text and "another adapter" in page.text
    assert all(str(finding) in page.text for finding in wrong.proof.findings)
    assert all(row["Remark"] == "not base + adapter" for name, row in table(page).items() if name[:-7] in MODULES)


def test_an_adapter_that_does_not_fit_ends_a_report_only_if_it_was_given(place: Path) -> None:
    """Found by itself it is a remark; asked for it is an error."""
    record = json.loads(Path("out/loraweld.json").read_text())
    shutil.rmtree("adapter")
    save_adapter(Path("adapter"), lora("model.layers.9.self_attn.q_proj", (16, 16)), base_model_name_or_path="base")
    record["adapters"][0]["sha256"] = hashlib.sha256(Path("adapter/adapter_model.safetensors").read_bytes()).hexdigest()
    Path("out/loraweld.json").write_text(json.dumps(record))
    report = loraweld.report_page("out", output="page.html")
    assert report.proof is None and "could not be planned again" in report.unproven
    assert any(change.relative_change for change in report.changes)
    with pytest.raises(loraweld.LoraweldError, match=r"layers\.9"):
        loraweld.report_page("out", adapter="adapter", output="page.html", overwrite=True)


def test_what_an_encoding_lost_is_what_the_merge_said(place: Path) -> None:
    """Two measurements by two codes: while the codes were made, and of the file in float64."""
    merged = loraweld.merge("adapter", output="four", save_method="merged_4bit", double_quant=False)
    assert len(merged.fidelity) == len(MODULES)
    report = loraweld.report_page("four", output="page.html")
    found = {change.tensor: change for change in report.changes}
    for weight in merged.fidelity:
        change = found[weight.tensor]
        # The file is read in its decoded dtype, which rounds once more.
        assert change.error == pytest.approx(weight.relative_error, rel=0.02)
        assert change.kept == pytest.approx(weight.kept, rel=0.05)
        assert change.lost is None
    assert "Rounded away" not in table(Page(report.page.read_text()))["model.norm.weight"]


def test_warnings_stand_before_notes_with_what_to_do(place: Path) -> None:
    """A change that is smaller than the steps of bfloat16."""
    shutil.rmtree("adapter")
    save_adapter(Path("adapter"), loras(*MODULES), base_model_name_or_path="base", lora_alpha=0.002)
    loraweld.merge("adapter", output="tiny")
    text = Page(loraweld.report_page("tiny", output="page.html").page.read_text()).text
    warnings = text[text.index("Warnings") : text.index("Layers and modules")]
    assert all(cure in warnings for cure in ("--dtype float32", "--rounding stochastic --seed N", "--scale"))
    assert "WARNING" not in text


def test_what_changed_outside_the_layers_alone_has_no_cell(place: Path) -> None:
    """The embedding has numbers that no layer has: they are in the table, the map has those of the layers."""
    shutil.rmtree("adapter")
    save_adapter(Path("adapter"), loras("model.embed_tokens"), base_model_name_or_path="base")
    loraweld.merge("adapter", output="embedding")
    report = loraweld.report_page("embedding", output="page.html")
    assert report.proof is not None and report.proof.holds
    rows = table(Page(report.page.read_text()))
    assert {name for name, row in rows.items() if row["Kept"] != "–"} == {"model.embed_tokens.weight"}
    kept = next(measure for measure in MEASURES if measure.key == "kept")
    assert cells(report.changes, kept) == [] and len(cells(report.changes, MEASURES[0])) > 0


def test_another_tools_model_needs_no_record(place: Path) -> None:
    """With base and adapter named, all is known that a record would not add."""
    Path("out/loraweld.json").unlink()
    report = loraweld.report_page("out", base="base", adapter="adapter", output="page.html")
    assert report.proof is not None and report.proof.holds
    page = Page(report.page.read_text())
    assert "The model is base + adapter" in page.text and "not known" not in page.text
    bare = Page(loraweld.report_page("out", base="base", output="page.html", overwrite=True).page.read_text())
    assert "no loraweld.json" in bare.text and "--adapter" in bare.text


# The run


def told(report: MergeReport, **others: object) -> Path:
    path = Path("run.json")
    path.write_text(json.dumps(report.to_json() | others))
    return path


def test_the_run_is_that_of_its_own_report(place: Path) -> None:
    """Time and rate, and what was measured while encoding, where the adapter is not at hand."""
    report = loraweld.merge("adapter", output="four", save_method="merged_4bit", double_quant=False)
    shutil.move("adapter", "elsewhere")
    seconds = {"seconds": 12.5, "bytes_written": 50_000_000, "resumed_bytes": 3_000_000}
    made = loraweld.report_page("four", run=told(report, **seconds), output="page.html")
    page = Page(made.page.read_text())
    assert ["Time", "12.5 s"] in page.rows and ["Written", "50.00 MB, 4.00 MB/s"] in page.rows
    assert ["Finished by an earlier run", "3.00 MB"] in page.rows
    (tensors,) = (row[1].split(", ") for row in page.rows if row[:1] == ["Tensors"])
    assert set(tensors) == {f"{count} {kind}" for kind, count in report.recipes.items()}
    fidelity = {weight.tensor: weight for weight in report.fidelity}
    for name, row in table(page).items():
        weight = fidelity.get(name)
        kept = None if weight is None else weight.kept
        assert row["Kept"] == ("–" if kept is None else f"{100 * kept:.6g} %")
    assert "from the report of the run" in page.text
    without = Page(loraweld.report_page("four", output="page.html", overwrite=True).page.read_text())
    assert "--run" in without.text and not any(row[:1] == ["Time"] for row in without.rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"seconds": "12"}, "wrong types of seconds"),
        ({"fidelity": [1]}, "wrong types of fidelity"),
        ({"save_method": "merged_4bit"}, "another merge .* save_method"),
        ({"modules": []}, "another merge .* modules"),
    ],
    ids=str,
)
def test_a_run_of_another_merge_is_refused(place: Path, damage: dict[str, object], message: str) -> None:
    loraweld.merge("adapter", output="again")
    report = loraweld.merge("adapter", output="again")
    with pytest.raises(loraweld.RequestError, match=message):
        loraweld.report_page("out", run=told(report, **damage), output="page.html")
    assert not Path("page.html").exists()
    good = loraweld.report_page("out", run=told(report), output="page.html")
    assert "was there already" in Page(good.page.read_text()).text


# Two models


def test_a_comparison_has_the_same_page(place: Path) -> None:
    """The numbers of compare, tensors that only one has, and the same from the command line."""
    tensors = {name: tensor for name, tensor in load_folder(Path("out")).items() if name != "model.norm.weight"}
    save_base(Path("other"), {**tensors, "model.more.weight": torch.ones(2)}, llama_config())
    report = loraweld.compare_page("base", "other", output="page.html")
    assert report.to_json() | {"seconds": 0} == loraweld.compare("base", "other").to_json() | {"seconds": 0}
    page = Page(Path("page.html").read_text())
    assert "other compared with base" in page.text and page.loads == []
    rows = table(page)
    assert rows.keys() == {*tensors, "model.more.weight"}
    for one in report.differing:
        assert one.relative is not None
        assert rows[one.tensor]["Change"] == f"{100 * one.relative:.6g} %"
        assert rows[one.tensor]["Largest difference"] == f"{one.largest:.8g}"
        assert rows[one.tensor]["Cosine of the weights"] == f"{one.cosine:.8g}"
    same = rows.keys() - {one.tensor for one in report.differing} - {"model.more.weight"}
    assert {rows[name]["Change"] for name in same} == {"0 %"}
    assert rows["model.more.weight"]["Remark"] == "not in the first"
    assert "missing in the second model: model.norm.weight" in page.text
    before = Path("page.html").read_bytes()
    done = run("compare", "base", "other", "-o", "page.html")
    assert done.returncode == 1 and "--overwrite" in done.stderr
    done = run("compare", "base", "other", "-o", "page.html", "--overwrite", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["missing"] == ["model.norm.weight"]
    assert Path("page.html").read_bytes() == before


def test_a_model_is_compared_with_base_and_adapter(place: Path) -> None:
    """What verify says, with its exit code, and the page of report; with neither B nor adapter it is a usage error."""
    sides = ("--base", "base", "--adapter", "adapter")
    seconds = re.compile(r"checked in [\d.]+ s")
    done, verified = run("compare", "out", *sides), run("verify", "out", *sides)
    assert (done.returncode, seconds.sub("", done.stdout)) == (0, seconds.sub("", verified.stdout))
    done = run("compare", "out", *sides, "-o", "page.html")
    assert (done.returncode, seconds.sub("", done.stdout)) == (0, seconds.sub("", verified.stdout))
    loraweld.report_page("out", base="base", adapter="adapter", output="same.html")
    assert Path("page.html").read_bytes() == Path("same.html").read_bytes()
    assert run("compare", "out", *sides, "--scale", "0.5").returncode == 1
    for line in (("out",), ("out", "base", "--adapter", "adapter")):
        done = run("compare", *line)
        assert done.returncode == 2 and "--adapter" in done.stderr
    packed = Path("packed")
    packed.mkdir()
    record = {**json.loads(Path("out/loraweld.json").read_text()), "save_method": "gguf"}
    (packed / "loraweld.json").write_text(json.dumps(record))
    (packed / "packed-Q8_0.gguf").write_bytes(b"GGUF")
    done = run("compare", "packed", *sides, "-o", "none.html")
    assert done.returncode == 1 and "no weights" in done.stderr


def test_places_of_tensors() -> None:
    """The first number is the layer; experts share a column; several stacks are told apart."""
    found = places(["model.layers.3.mlp.experts.7.up_proj.weight", "model.norm.weight", "model.layers.0.mlp.weight"])
    assert [(place.layer, place.module) for place in found.values()] == [
        (3, "mlp.experts.7.up_proj.weight"),
        (None, "model.norm.weight"),
        (0, "mlp.weight"),
    ]
    assert kind_of("mlp.experts.7.up_proj.weight") == "mlp.experts.*.up_proj"
    both = places(["encoder.layer.0.q.weight", "decoder.layer.0.q.weight", "h.1.q.weight"])
    assert len({place.module for place in both.values()}) == 3
    assert places(["h.1.q.weight", "0.q.weight"])["0.q.weight"].layer == 0
    experts = [
        TensorChange(tensor=f"l.0.e.{i}.w", layer=0, module=f"e.{i}.w", shape=(1,), relative_change=i / 4)
        for i in range(4)
    ]
    (cell,) = cells(experts, MEASURES[0])
    assert (cell.change.tensor, cell.value, cell.num_tensors) == ("l.0.e.3.w", 0.75, 4)


def run(*arguments: str, code: str = "from loraweld.cli import main; main()") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_the_command(place: Path) -> None:
    """The page, a line on it, the numbers as JSON; a page that exists is kept; an adapter is refused."""
    done = run("report", "out", "-o", "page.html", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    before = Path("page.html").read_bytes()
    done = run("report", "out", "-o", "page.html")
    assert done.returncode == 1 and "--overwrite" in done.stderr
    assert Path("page.html").read_bytes() == before
    done = run("report", "out", "-o", "page.html", "--json", "--overwrite", "--base", "base")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["reason"] is None and len(found["changes"]) == len(SHAPES)
    assert Path("page.html").read_bytes() == before
    done = run("report", "adapter", "-o", "other.html")
    assert done.returncode == 1 and "is an adapter" in done.stderr
    done = run("report", "out", "-o", "missing/page.html")
    assert done.returncode == 1 and "cannot be written" in done.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["adapter", "base", "out", "page.html"]


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_without_the_extra_the_message_says_how_to_get_it(place: Path, package: str) -> None:
    """Nothing is measured first."""
    hidden = f"""
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)
from loraweld.cli import main
main()
"""
    done = run("report", "out", code=hidden)
    assert done.returncode == 1
    assert f"needs {package}: pip install 'loraweld[report]'" in done.stderr


def shown(page: Path, profile: Path) -> tuple[str, list[str]]:
    """Return what Chromium makes of a page after its scripts ran, and what it says on the console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", page.resolve().as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=180,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# What a reader does: sort the table by the change, choose a measure, point at a cell of the map.
READER = """<script>
document.querySelectorAll("#tensor-table th button")[2].click();
document.querySelector("input[name=measure][value=MEASURE]").click();
setTimeout(() => {
  const plot = document.querySelector("#heat-map .nsewdrag"), place = plot.getBoundingClientRect();
  const point = {clientX: place.right - 5, clientY: place.bottom - 5, bubbles: true};
  plot.dispatchEvent(new MouseEvent("mousemove", point));
}, 500);
</script></body>"""


def read_in_browser(page: Path, measure: str, profile: Path) -> str:
    """Return the document after a reader has used it; the console stays empty."""
    page.write_text(page.read_text().replace("</body>", READER.replace("MEASURE", measure)))
    document, console = shown(page, profile)
    assert console == []
    return document


def hovered(document: str) -> list[str]:
    """The lines of the box under the pointer."""
    box = re.search(r'class="hovertext".*?</text>', document)
    assert box is not None
    return [html.unescape(re.sub(r"<[^>]+>", "", line)) for line in re.findall(r"<tspan.*?</tspan>", box[0])]


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("measure", ["relative_change", "cosine", "lost"])
def test_a_browser_draws_the_page_without_a_complaint(place: Path, measure: str) -> None:
    """Both charts are drawn and follow the choice, a cell says all its numbers, the table sorts."""
    report = loraweld.report_page("out", output="page.html")
    document = read_in_browser(report.page, measure, place / "profile")
    chosen = next(one for one in MEASURES if one.key == measure)
    for chart in ("heat-map", "histogram"):
        drawn = document[document.index(f'<div id="{chart}"') :]
        drawn = drawn[: drawn.index("</figure>")]
        assert 'class="main-svg"' in drawn
        assert re.search(rf">{chosen.label.lower()}</text>", drawn), chart
    assert "data:image/png" in document  # the cells of the map
    visible = re.findall(r'<span data-measure="(\w+)">', document)
    assert visible == [measure]
    by_name = {change.tensor: change for change in report.changes}
    name, *lines = hovered(document)
    assert name.startswith("model.layers.1.")
    known = [one for one in MEASURES if one.of(by_name[name]) is not None]
    assert len(known) == 7
    assert set(lines) == {f"{one.label.lower()} {one.show(one.of(by_name[name]) or 0.0)}" for one in known}
    assert lines[0].startswith(chosen.label.lower())
    in_table = document[document.index('<table id="tensor-table">') :].partition("</table>")[0]
    assert 'aria-sort="descending"' in in_table
    values = [float(row["Change"].removesuffix(" %")) / 100 for row in table(Page(f"{in_table}</table>")).values()]
    expected = sorted((change.relative_change for change in report.changes), reverse=True)
    assert values == pytest.approx(expected, rel=1e-5)


@pytest.mark.browser
@needs_chromium
def test_a_browser_draws_a_comparison_without_a_complaint(place: Path) -> None:
    """The same of two models."""
    report = loraweld.compare_page("base", "out", output="page.html")
    document = read_in_browser(Path("page.html"), "largest", place / "profile")
    name, *lines = hovered(document)
    one = next(one for one in report.differing if one.tensor == name)
    assert lines[0] == f"largest difference {one.largest:.8g}"


@pytest.mark.browser
@needs_chromium
def test_the_browser_check_sees_complaints(tmp_path: Path) -> None:
    """A page that loads something against its policy, or whose script fails, is noticed."""
    page = tmp_path / "bad.html"
    page.write_text("<html><body><script>undefinedFunction()</script></body></html>")
    _, console = shown(page, tmp_path / "profile")
    assert any("undefinedFunction" in line for line in console)
