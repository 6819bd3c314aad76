"""Two models → a PEFT LoRA adapter: open, compare, decompose, write. Here is the order of the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.hub import locate_base
from loraweld.checkpoint.reader import Reader
from loraweld.compute.difference import difference, is_same_weight, read_tiles
from loraweld.compute.truncated import Truncated, truncate, working_dtype
from loraweld.errors import MatchError, NumericsError, OutputError, listing
from loraweld.extraction.adapter import Spool, write_config
from loraweld.extraction.aside import Aside, put_aside
from loraweld.extraction.pairs import Pair, find_pairs
from loraweld.extraction.report import ExtractedModule, ExtractReport, SavedParameter
from loraweld.extraction.request import DEFAULT_RANK, ExtractRequest, make_extract_request
from loraweld.planning.companions import override_files
from loraweld.planning.facts import stored_once
from loraweld.planning.paths import check_place
from loraweld.request import PathLike
from loraweld.sinks.folder import TAKEN, FolderSink, open_folder_sink, staging_folder
from loraweld.torch_settings import plain_arithmetic

Progress = Callable[[int], None]
# Keys of a config that do not change what the model computes, or that a merge sets from the tensors.
_NOT_OF_THE_FUNCTION = frozenset(
    {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"}
    | {"quantization_config", "compression_config", "vocab_size", "tie_word_embeddings"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The two models; `weights` are the parameters to compare, with the bytes that takes."""

    base: Base
    tuned: Base
    weights: tuple[Pair, ...]


def extract(
    *,
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    rank: int = DEFAULT_RANK,
    energy: float | None = None,
    modules_to_save: bool = True,
    overwrite: bool = False,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write to the folder `output` the PEFT LoRA adapter of low rank that leads from `base` to `tuned`.

    Args:
        base: the model to start from, a folder, a Hub id or a URL; quantised ones are decoded.
        tuned: the model to come to, of the same architecture.
        output: the folder that will hold the adapter; it appears when it is complete.
        rank: the largest rank of any module.
        energy: share of ‖Δ‖² that is enough for a module; None uses `rank` for all.
        modules_to_save: keep whole what no low rank expresses (norms, biases, embeddings of another size); False
            refuses it by name.
        overwrite: replace an output that exists.
        token: of the Hub; True or None: the stored login.
        progress: called with the number of bytes that were compared.

    Raises:
        LoraweldError: something the user can fix; `output` is as it was.
    """
    request = make_extract_request(
        base=base,
        tuned=tuned,
        output=output,
        rank=rank,
        energy=energy,
        modules_to_save=modules_to_save,
        overwrite=overwrite,
        token=token,
    )
    return extract_request(request, progress=progress or (lambda count: None))


def extract_request(
    request: ExtractRequest, *, progress: Progress, on_plan: Callable[[Comparison], None] | None = None
) -> ExtractReport:
    """Compare, write and report; `on_plan` is called before the first weight is read."""
    started = time.monotonic()
    try:
        compared = _open(request)
        if on_plan:
            on_plan(compared)
        return _Extraction(request, compared, progress).run(started)
    except OSError as error:
        raise OutputError(f"{str(error.filename or request.output)[:200]}: {error.strerror}") from None


def _open(request: ExtractRequest) -> Comparison:
    base, tuned = (_open_model(name, request.token) for name in (request.base, request.tuned))
    check_place(request.output, [base.folder, tuned.folder])
    if request.output.is_dir() and any(request.output.iterdir()) and not request.overwrite:
        raise OutputError(TAKEN, path=request.output)
    return Comparison(base=base, tuned=tuned, weights=find_pairs(base, tuned))


def _open_model(name: str, token: str | bool | None) -> Base:
    located = locate_base(name, token=token)
    model = open_base(located.folder, label=located.label, commit=located.commit, scratch=located.scratch)
    return stored_once(model)[0]


class _Extraction:
    """One run: reads both models once, a tensor at a time."""

    def __init__(self, request: ExtractRequest, compared: Comparison, progress: Progress) -> None:
        self._request = request
        self._compared = compared
        self._progress = progress
        self._reader = Reader()
        self._modules: list[ExtractedModule] = []
        self._saved: list[SavedParameter] = []
        self._unchanged = 0

    def run(self, started: float) -> ExtractReport:
        request, compared = self._request, self._compared
        # One thread also because many small steps would wait for each other otherwise.
        with closing(self._reader), plain_arithmetic():
            changed = self._changed_whole()
            aside = put_aside(compared.weights, changed)
            self._check_allowed(aside)
            with open_folder_sink(
                request.output, identity=lambda: "extract", resume=False, overwrite=request.overwrite
            ) as sink:
                num_bytes = self._fill(sink, aside)
        return ExtractReport(
            output=request.output,
            base=compared.base.label,
            tuned=compared.tuned.label,
            rank=request.rank,
            energy=request.energy,
            modules=tuple(self._modules),
            saved=tuple(self._saved),
            unchanged=self._unchanged,
            notes=tuple(self._notes()),
            bytes_written=num_bytes,
            seconds=time.monotonic() - started,
        )

    def _changed_whole(self) -> list[Pair]:
        """The changed parameters for which there is no low rank."""
        changed = []
        for pair in self._compared.weights:
            if pair.kind != "other" and not pair.is_resized:
                continue
            if pair.is_resized or not is_same_weight(pair.base, pair.tuned, self._reader):
                changed.append(pair)
            else:
                self._unchanged += 1
            self._progress(pair.num_bytes)
        return changed

    def _check_allowed(self, aside: Aside) -> None:
        if self._request.saves_modules or not (aside.modules or aside.biases):
            return
        raise MatchError(
            "changed, but no weights of linear layers, and modules_to_save is off:\n"
            f"{listing([*aside.modules, *aside.biases])}\nLeave --no-modules-to-save out to keep them whole"
        )

    def _fill(self, sink: FolderSink, aside: Aside) -> int:
        try:
            with closing(Spool(staging_folder(self._request.output) / "tensors")) as spool:
                self._spool_low_rank(spool, aside)
                self._spool_whole(spool, aside)
                num_bytes = spool.write(sink)
            self._write_small(sink, aside)
            sink.publish()
        except BaseException:
            sink.clean_up()  # nothing of it would be continued
            raise
        return num_bytes

    def _spool_low_rank(self, spool: Spool, aside: Aside) -> None:
        for pair in self._compared.weights:
            if pair.kind == "other" or pair.is_resized or aside.holds(pair):
                continue
            found = self._truncated(pair)
            if found is None:
                self._unchanged += 1
            else:
                self._spool_factors(spool, pair, found)
            self._progress(pair.num_bytes)
        if not self._modules:
            raise MatchError(
                f"no linear layer of {self._compared.tuned.label} differs from {self._compared.base.label}: there is "
                "nothing for a LoRA adapter. Is it the model that was trained?"
            )

    def _truncated(self, pair: Pair) -> Truncated | None:
        if is_same_weight(pair.base, pair.tuned, self._reader):
            return None
        rank, rows, cols = self._request.rank, pair.tuned.rows, pair.tuned.cols
        delta = difference(pair.base, pair.tuned, self._reader, working_dtype(rows, cols, rank))
        if not bool(torch.isfinite(delta).all()):
            raise NumericsError(f"{pair.name}: the models differ by what is infinite or not a number; file damaged?")
        return truncate(delta, rank=rank, energy=self._request.energy)

    def _spool_factors(self, spool: Spool, pair: Pair, found: Truncated) -> None:
        for module, kind in ((pair.module, pair.kind), *((twin.module, twin.kind) for twin in pair.twins)):
            for key, factor in _factors(kind, found, pair.tuned.shape):
                spool.add(f"{module}.{key}", "F32", tuple(factor.shape), [_bytes(factor)])
            self._modules.append(
                ExtractedModule(
                    module=module,
                    kind=kind,
                    rank=found.left_NR.shape[1],
                    squared_norm=found.squared_norm,
                    squared_kept=found.squared_kept,
                )
            )

    def _spool_whole(self, spool: Spool, aside: Aside) -> None:
        adapted = {module.module for module in self._modules}
        for pair in self._compared.weights:
            if aside.holds(pair):
                twins = (f"{twin.module}.weight" for twin in pair.twins)
                for parameter in (pair.parameter, *twins):
                    self._spool_parameter(spool, parameter, parameter, pair.tuned, "modules_to_save")
            elif pair.parameter in aside.biases:
                key = f"{pair.module}.base_layer.bias" if pair.module in adapted else pair.parameter
                self._spool_parameter(spool, key, pair.parameter, pair.tuned, "bias")

    def _spool_parameter(self, spool: Spool, key: str, parameter: str, source: Source, how: str) -> None:
        size = spool.add(key, source.dtype, source.shape, map(_bytes, read_tiles(source, self._reader)))
        self._saved.append(SavedParameter(parameter=parameter, how=how, num_bytes=size))

    def _write_small(self, sink: FolderSink, aside: Aside) -> None:
        compared = self._compared
        write_config(
            sink,
            base=compared.base.label,
            base_config=compared.base.config,
            modules=self._modules,
            saved=self._saved,
            saved_modules=aside.modules,
        )
        for path in override_files(compared.tuned.folder):
            sink.copy(path.relative_to(compared.tuned.folder).as_posix(), path)

    def _notes(self) -> Iterator[str]:
        energy = self._request.energy
        short = [module for module in self._modules if energy is not None and module.kept < energy * (1 - 1e-9)]
        if short:
            yield (
                f"rank {self._request.rank} does not reach {energy:.2%} of the change in {len(short)} of "
                f"{len(self._modules)} modules; give a larger rank"
            )
        differing = _other_settings(self._compared.base, self._compared.tuned)
        if differing:
            yield f"an adapter holds no config: of the tuned model's, these are not the base's: {', '.join(differing)}"
        resized = [pair for pair in self._compared.weights if pair.is_resized]
        if resized:
            rows = resized[0].tuned.rows
            yield f"other sizes than in the base: PEFT needs it resized first (resize_token_embeddings({rows}))"


def _other_settings(base: Base, tuned: Base) -> list[str]:
    """What both configs say, and differently, besides where they are from and how the weights are stored."""
    return [
        key
        for key in sorted(base.config.keys() & tuned.config.keys() - _NOT_OF_THE_FUNCTION)
        if base.config[key] != tuned.config[key]
    ]


def _factors(kind: str, found: Truncated, shape: tuple[int, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield PEFT's factors (end of their names, values) of a change stored with `shape`; B·A is (outputs, inputs)."""
    left_NR, right_RC = found.left_NR, found.right_RC
    rank = left_NR.shape[1]
    match kind:
        case "conv1d":  # stored (inputs, outputs)
            yield from (("lora_A.weight", left_NR.T), ("lora_B.weight", right_RC.T))
        case "embedding":  # stored (tokens, outputs)
            yield from (("lora_embedding_A", left_NR.T), ("lora_embedding_B", right_RC.T))
        case _:
            yield "lora_A.weight", right_RC.reshape(rank, *shape[1:])
            yield "lora_B.weight", left_NR.reshape(shape[0], rank, *(1 for _ in shape[2:]))


def _bytes(rows: torch.Tensor) -> bytes:
    return rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
