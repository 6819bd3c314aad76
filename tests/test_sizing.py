"""The time on many machines: the published models, the sizing of their plans, and a simulation without its formula."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import loraweld
from fakes import llama_shapes, random_factors, random_tensors, write_adapter, write_base
from loraweld.cli import main
from loraweld.errors import RequestError
from loraweld.execute import sizing
from loraweld.execute.items import work_items
from loraweld.execute.sizing import Anywhere, Machines, Work, item_work, make_machines, parse_rate, size_plan, split
from loraweld.planning.merge_plan import MergePlan
from processes import run_python
from simulation import Simulation, played
from synthetic_published import DEEPSEEK_V3, MODELS, mixture_tensors, num_parameters
from synthetic_published import write_adapter as write_published_adapter
from synthetic_published import write_base as write_published_base

RESULTS = Path(__file__).parent.parent / "benchmarks" / "RESULTS.md"
# Of the model cards: billions of parameters. DeepSeek-V3: 671 in 61 layers, 11.5 in the layer that predicts a second
# token, and embedding and head, which are in the file for that layer again.
PUBLISHED = {"llama-3.1-405b": 405.85, "deepseek-v3": 671.03 + 11.5 + 2 * 0.927, "kimi-k2": 1026.4}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_are_as_large_as_published(name: str) -> None:
    assert num_parameters(MODELS[name].tensors()) / 1e9 == pytest.approx(PUBLISHED[name], rel=3e-4)


def test_the_main_layers_of_deepseek_v3() -> None:
    main_layers = {name: one for name, one in mixture_tensors(DEEPSEEK_V3).items() if ".layers.61." not in name}
    assert num_parameters(main_layers) / 1e9 == pytest.approx(671.03, rel=1e-5)


def published(folder: Path, name: str, method: str, *, experts: bool = False) -> MergePlan:
    write_published_base(folder / "base", MODELS[name])
    write_published_adapter(folder / "adapter", MODELS[name], folder / "base", 16, experts=experts)
    return loraweld.plan(folder / "adapter", base=folder / "base", output=folder / "out", save_method=method)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    return published(tmp_path_factory.mktemp("llama"), "llama-3.1-405b", "merged_16bit")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    return published(tmp_path_factory.mktemp("deepseek"), "deepseek-v3", "preserve")


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_everything_is_read_and_written_once(name: str, request: pytest.FixtureRequest) -> None:
    """The shares of all items add up to the tensors' bytes, and to the factors of the adapter."""
    plan: MergePlan = request.getfixturevalue(name)
    model = MODELS["llama-3.1-405b" if name == "llama" else "deepseek-v3"]
    base = sum(stored.nbytes for stored in model.tensors().values())
    factors = sum(4 * 16 * (rows + cols) for _, (rows, cols) in model.adapted())
    whole = size_plan(plan, Machines(network=1.0), [1]).whole
    assert whole.read == pytest.approx(base + factors, rel=1e-9)
    assert whole.written == pytest.approx(base, rel=1e-9)


def test_every_edit_is_counted_once_per_element(llama: MergePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second for each element and rank, and nothing else, the seconds are the products' sizes."""
    for name in ("MOVE_NS", "VALUE_NS", "MOVE_SECONDS_PER_BYTE", "EDIT_NS"):
        monkeypatch.setattr(sizing, name, 0.0)
    monkeypatch.setattr(sizing, "EDIT_NS_PER_RANK", 1e9)
    expected = 16 * sum(rows * cols for _, (rows, cols) in MODELS["llama-3.1-405b"].adapted())
    assert size_plan(llama, Machines(network=1.0), [1]).whole.seconds == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_experts_take_no_more_memory_to_plan(tmp_path: Path) -> None:
    """Kimi K2 has 139,583 tensors; at most 300 MiB for each 100,000, with Python. All experts are adapted."""
    write_published_base(tmp_path / "base", MODELS["kimi-k2"])
    write_published_adapter(tmp_path / "adapter", MODELS["kimi-k2"], tmp_path / "base", 16, experts=True)
    script = (
        "import loraweld, re\n"
        "plan = loraweld.plan('adapter', base='base', output='out', save_method='preserve')\n"
        # not ru_maxrss: that of a new process begins with what the test has in memory
        "peak = re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(plan.recipes_by_kind['edit'], peak)"
    )
    edited, kib = map(int, run_python("-c", script, cwd=tmp_path).stdout.split())
    assert edited == 61 * 5 + 60 * 384 * 3
    assert kib / 1024 <= 300 * 1.396


# What a machine does.


def item(num_bytes: int) -> Any:
    return SimpleNamespace(start=0, end=num_bytes)


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 20))
def test_runs_of_about_equal_bytes(sizes: list[int], count: int) -> None:
    """All items once and in order; no run is a largest item away from its share."""
    items = [item(size) for size in sizes]
    parts = split(items, count)
    assert len(parts) == count
    assert [one for part in parts for one in part] == items
    share, largest = sum(sizes) / count, max(sizes, default=0)
    assert all(abs(sum(one.end for one in part) - share) <= largest for part in parts)


works = st.builds(
    Work,
    read=st.floats(0, 1e8),
    written=st.floats(0, 1e8),
    seconds=st.floats(0, 1),
)
rates = st.floats(1e7, 1e10)
fleets = st.builds(Machines, network=rates, disk=st.none() | rates, store=st.none() | rates)


@given(st.lists(st.lists(works, max_size=8), min_size=1, max_size=6), fleets, st.integers(1, 6))
def test_no_run_is_faster_than_on_paper(parts: list[list[Work]], machines: Machines, threads: int) -> None:
    """Whatever the work and the machines: each of the times on paper is a lower bound, and all steps of all items one
    after the other on one thread is an upper one."""
    plan: Any = SimpleNamespace(workers=threads, weights=(), recipes=(), bytes_read=0)
    everything = [work for part in parts for work in part]
    total = sizing._sum(everything)
    longest = max((work.alone(machines) for work in everything), default=0.0)
    paper = sizing._estimate(plan, machines, total, [sizing._sum(part) for part in parts], longest)
    time = Simulation(machines, parts, threads, spread=0.0).seconds()
    assert time >= (paper.total - paper.serial) * (1 - 1e-9) - 1e-9
    store = (total.read + total.written) / machines.store if machines.store else 0.0
    assert time <= sum(work.alone(machines) for work in everything) + store + 1e-9


LARGE_STORE = Machines(network=parse_rate("network", "2.5Gbit"), store=parse_rate("store", "100GB"))
COUNTS = [1, 8, 64, 512]


@pytest.mark.parametrize(("name", "streams", "least"), [("llama", 0.95, 0.9), ("deepseek", 0.9, 0.75)])
def test_near_linear_to_64_machines_and_where_it_ends(
    name: str, streams: float, least: float, request: pytest.FixtureRequest
) -> None:
    """2.5 Gbit/s each way and 100 GB/s in all: the store is busy from 160 machines on. Each machine plans alone: with
    91,991 tensors that is a sixth of the time on 64."""
    plan: MergePlan = request.getfixturevalue(name)
    times = played(plan, LARGE_STORE, COUNTS)
    paper = {one.machines: one for one in size_plan(plan, LARGE_STORE, COUNTS).estimates}
    for count in COUNTS:
        assert 0.995 * paper[count].total <= times[count] <= 1.05 * paper[count].total + paper[count].item, count
    efficiency = {count: times[1] / (count * times[count]) for count in COUNTS}
    assert efficiency[8] >= 0.95
    assert efficiency[64] >= least
    assert efficiency[512] <= 0.3
    streaming = {count: times[count] - paper[count].serial for count in COUNTS}
    assert streaming[1] / (64 * streaming[64]) >= streams
    assert paper[64].slowest in ("reading", "writing")
    assert paper[512].slowest == "store"


def test_latency_is_hidden_by_threads(llama: MergePlan) -> None:
    """50 ms before each request cost a thread time, not a link: below 4 items in flight it shows."""
    slow, fast = (Machines(network=parse_rate("network", rate)) for rate in ("2.5Gbit", "10Gbit"))
    assert played(llama, slow, [8], latency=0.05)[8] <= 1.05 * played(llama, slow, [8])[8]
    assert played(llama, fast, [8], latency=0.05)[8] >= 1.1 * played(llama, fast, [8])[8]


def test_the_largest_item_is_a_limit(deepseek: MergePlan) -> None:
    """A weight that is encoded is one item: on machines without number it alone is left."""
    items = list(work_items(deepseek, Anywhere()))
    machines = Machines(network=1e9)
    longest = max(item_work(one).alone(machines) for one in items)
    one = size_plan(deepseek, machines, [len(items)]).estimates[0]
    assert one.item == longest
    assert one.total == pytest.approx(one.serial + longest, rel=0.2)


# The measured costs.


def measured_costs() -> dict[str, float]:
    """Nanoseconds an element, from the table of the results."""
    section = RESULTS.read_text().split("\n## Work by its kind\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\S.*?) +\| +([\d.]+) \|", section, re.MULTILINE)
    return {name: float(value) for name, value in rows}


def on_paper(kind: str) -> float:
    """The sum of the steps that a kind names."""
    source, _, target = (part.split(",")[0] for part in kind.partition(" → "))
    if source == "kept":
        return sizing.MOVE_NS
    found = sizing.MOVE_NS + sizing.VALUE_NS
    found += sizing.DECODE_NS.get(source, 0.0)
    found += (sizing.ENCODE_EDITED_NS if "edited" in kind else sizing.ENCODE_NS).get(target, 0.0)
    if rank := re.search(r", r (\d+)", kind):
        found += sizing.EDIT_NS + sizing.EDIT_NS_PER_RANK * int(rank[1])
    return found


def test_the_costs_are_those_that_were_measured() -> None:
    """The steps add up to what whole merges of each kind took, within a fifth."""
    measured = measured_costs()
    assert len(measured) == 12
    for kind, nanoseconds in measured.items():
        assert on_paper(kind) == pytest.approx(nanoseconds, rel=0.2), kind


# The command.


@pytest.mark.parametrize(
    ("text", "rate"),
    [("2GB", 2e9), ("2GB/s", 2e9), ("10Gbit", 1.25e9), ("10 Gbit/s", 1.25e9), ("800Mbit", 1e8), ("1GiB", 2**30)],
)
def test_bandwidths(text: str, rate: float) -> None:
    assert parse_rate("x", text) == rate


@pytest.mark.parametrize("text", ["", "fast", "10Gb", "-1GB", "0GB", "bit", "GB"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(RequestError, match=re.escape(f"store_bandwidth is {text!r}, expected bytes or bits")):
        make_machines(store_bandwidth=text)


Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line where a base and an adapter are."""
    shapes = llama_shapes()
    write_base(tmp_path / "base", random_tensors(shapes, torch.bfloat16))
    write_adapter(tmp_path / "adapter", random_factors({n: s for n, s in shapes.items() if "proj" in n}))
    monkeypatch.chdir(tmp_path)

    def command(line: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(line.split())
        return int(ended.value.code or 0), *capsys.readouterr()

    return command


def test_a_table(run: Run) -> None:
    code, out, _ = run("plan adapter --base base -o out --machines 1 4 --disk-bandwidth 1GB --store-bandwidth 8Gbit")
    lines = out.splitlines()[-4:]
    assert code == 0
    assert "network 1.25 GB/s each way, disk 1.00 GB/s, store 1.00 GB/s in all" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["machines", "1", "4"]


def test_json(run: Run) -> None:
    code, out, _ = run("plan adapter --base base -o out --machines 2 --network-bandwidth 1KB --json")
    found = json.loads(out)["sizing"]
    (one,) = found["estimates"]
    assert code == 0
    assert found["network"] == 1000
    adapter = sum(factor.numel() * 4 for factor in load_file("adapter/adapter_model.safetensors").values())
    weights = sum(tensor.nbytes for tensor in load_file("base/model.safetensors").values())
    assert (found["read"], found["written"]) == (pytest.approx(weights + adapter), pytest.approx(weights))
    assert one["reading"] == pytest.approx(found["read"] / 1000)  # it is a single item, the second machine has none
    assert one["total"] == pytest.approx(one["item"] + one["serial"])
    assert one["item"] == pytest.approx((found["read"] + found["written"]) / 1000, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--store-bandwidth 1GB", 2, "store_bandwidth has no effect without machines"),
        ("--machines 1 --network-bandwidth much", 2, "network_bandwidth is 'much'"),
        ("--machines 0", 1, "machines is 0, expected 1 to"),
        ("--machines 2 --save-method lora", 1, "machines has no effect with save_method lora"),
    ],
)
def test_what_is_refused(run: Run, options: str, code: int, message: str) -> None:
    found, out, err = run(f"plan adapter --base base -o out {options}")
    assert (found, out) == (code, "")
    assert message in err
