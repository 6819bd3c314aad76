"""argv → request; error → exit code; nothing else.

Exit codes: 0 done, 1 something the user can fix (one message on stderr), 2 usage, 130 interrupted.
argparse, not typer: typer with rich takes 0.3 s to print a help page, which is the whole budget.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from loraweld._version import __version__
from loraweld.arguments import (
    add_extract_arguments,
    add_merge_arguments,
    add_report_arguments,
    add_sides,
    add_sizing_arguments,
    add_telling,
)
from loraweld.errors import LoraweldError, RequestError, printable
from loraweld.planning.collector import collector_paused
from loraweld.request import MergeRequest, make_request


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = make_parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except LoraweldError as error:
        _fail(f"error: {error}", 2 if isinstance(error, _UsageError) else 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues", 130)
    except BrokenPipeError:  # `loraweld inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    gc.freeze()  # it all ends with the process: to search torch's modules for cycles now takes 0.3 s
    sys.exit(0)


class _UsageError(RequestError):
    """An option's value that cannot be read: exit code 2, as for an unknown option."""


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    print(f"loraweld: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _merge(arguments: argparse.Namespace) -> None:
    from loraweld.api import merge_request
    from loraweld.progress import show_progress
    from loraweld.sinks.system import keep_freed_memory

    keep_freed_memory()
    quiet = arguments.quiet or arguments.json
    request = _request(arguments)
    with show_progress(quiet=quiet) as shown:
        report = merge_request(request, progress=shown.advance, on_plan=shown.begin, on_export=shown.say)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
    elif not arguments.quiet:
        print(printable("\n".join(report.lines())))


def _plan(arguments: argparse.Namespace) -> None:
    with collector_paused():  # until the plan is gone again: printing it makes an object for each tensor too
        _show_plan(arguments)


def _show_plan(arguments: argparse.Namespace) -> None:
    from loraweld.api import save_plan
    from loraweld.execute.sizing import make_machines, size_plan
    from loraweld.preparation import plan_request
    from loraweld.report import plan_lines

    request, rates = _request(arguments), _rates(arguments)
    try:
        machines = make_machines(**rates)
    except RequestError as error:
        raise _UsageError(str(error)) from None
    made = save_plan(request, Path(arguments.save)) if arguments.save else plan_request(request)[0]
    sizing = size_plan(made, machines, arguments.machines) if arguments.machines else None
    if arguments.json:
        print(json.dumps(made.to_json() | ({"sizing": sizing.to_json()} if sizing else {}), indent=2))
    elif not arguments.quiet:
        print(printable("\n".join([*plan_lines(made), *(sizing.lines() if sizing else [])])))


def _rates(arguments: argparse.Namespace) -> dict[str, str]:
    names = ("network_bandwidth", "disk_bandwidth", "store_bandwidth")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if given and not arguments.machines:
        raise _UsageError(f"{next(iter(given))} has no effect without machines; say how many, e.g. --machines 1 8 64")
    return given


def _run(arguments: argparse.Namespace) -> None:
    from loraweld.api import run_part
    from loraweld.progress import show_progress
    from loraweld.sinks.system import keep_freed_memory

    keep_freed_memory()
    with show_progress(quiet=arguments.quiet) as shown:
        run_part(arguments.plan, arguments.part, progress=shown.advance, on_plan=shown.begin)
    if not arguments.quiet:
        print(printable(f"part {arguments.part} of {arguments.plan} is made"))


def _publish(arguments: argparse.Namespace) -> None:
    from loraweld.api import publish

    report = publish(arguments.plan)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
    elif not arguments.quiet:
        print(printable("\n".join(report.lines())))


def _discard(arguments: argparse.Namespace) -> None:
    from loraweld.api import discard

    print(printable(f"{discard(arguments.plan)}: removed what was not published"))


def _extract(arguments: argparse.Namespace) -> None:
    from loraweld.extraction.request import make_extract_request

    names = ("base", "tuned", "output", "rank", "energy", "modules_to_save", "overwrite", "token")
    try:
        request = make_extract_request(**{name: getattr(arguments, name) for name in names})
    except RequestError as error:
        raise _UsageError(str(error)) from None
    from loraweld.extraction.extract import extract_request
    from loraweld.progress import show_progress

    try:
        with show_progress(quiet=arguments.quiet or arguments.json) as shown:
            report = extract_request(request, progress=shown.advance, on_plan=shown.begin)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
    elif not arguments.quiet:
        print(printable("\n".join(report.lines())))


def _report(arguments: argparse.Namespace) -> None:
    from loraweld.page.report_page import report_page
    from loraweld.progress import show_progress

    options = {name: getattr(arguments, name) for name in ("output", "base", "adapter", "run_file", "overwrite")}
    options["run"] = options.pop("run_file")
    with show_progress(quiet=arguments.quiet or arguments.json) as shown:
        report = report_page(
            arguments.model, **options, **_intended(arguments), progress=shown.advance, on_plan=shown.begin
        )
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
    elif not arguments.quiet:
        print(printable("\n".join(report.lines())))


def _verify(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.sample <= 1:
        raise _UsageError(f"--sample is {arguments.sample:g}, expected a share above 0 and up to 1, such as 0.1")
    from loraweld.verification.verify import verify

    sides = {"base": arguments.base, "adapter": arguments.adapter}
    report = verify(
        arguments.output,
        sample=arguments.sample,
        behaviour=arguments.behaviour,
        **sides,
        **_intended(arguments),
    )
    _tell(report, arguments, good=report.holds)


def _intended(arguments: argparse.Namespace) -> dict[str, Any]:
    """How a model was merged, as far as it was given."""
    names = (
        *("weights", "scale", "combine", "density", "seed", "svd_rank", "majority_sign_method"),
        *("merge_base", "expert_layout", "tokenizer", "token", "rounding"),
    )
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _tell(report: _Report, arguments: argparse.Namespace, *, good: bool) -> None:
    """Print a report; exit code 1 where not all is well."""
    print(json.dumps(report.to_json(), indent=2) if arguments.json else printable("\n".join(report.lines())))
    if not good:
        sys.stdout.flush()
        sys.exit(1)


class _Report(Protocol):
    def to_json(self) -> dict[str, Any]: ...

    def lines(self) -> list[str]: ...


def _compare(arguments: argparse.Namespace) -> None:
    if (arguments.second is None) == (not arguments.adapter):
        raise _UsageError("give a second model B, or the adapter with --adapter (and its base with --base)")
    if arguments.second is None:
        _compare_with_adapter(arguments)
        return
    from loraweld.page.compare_page import compare_page
    from loraweld.verification.compare import compare

    sides = arguments.first, arguments.second
    if arguments.output is None:
        report = compare(*sides)
    else:
        report = compare_page(*sides, output=arguments.output, overwrite=arguments.overwrite)
    _tell(report, arguments, good=report.is_equal)


def _compare_with_adapter(arguments: argparse.Namespace) -> None:
    """What verify tells, and report draws."""
    sides = {"base": arguments.base, "adapter": arguments.adapter, **_intended(arguments)}
    if arguments.output is None:
        from loraweld.verification.verify import verify

        report = verify(arguments.first, **sides)
    else:
        from loraweld.page.report_page import report_page

        page = report_page(arguments.first, output=arguments.output, overwrite=arguments.overwrite, **sides)
        if page.proof is None:
            raise RequestError(f"{arguments.first} cannot be compared: {page.unproven}")
        report = page.proof
    _tell(report, arguments, good=report.holds)


def _inspect(arguments: argparse.Namespace) -> None:
    from loraweld.inspection import inspect
    from loraweld.report import inspect_lines

    found = inspect(arguments.path)
    print(json.dumps(found, indent=2) if arguments.json else printable("\n".join(inspect_lines(found))))


def _request(arguments: argparse.Namespace) -> MergeRequest:
    options: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in (
            *("output", "base", "save_method", "dtype", "rounding", "max_shard_size", "max_memory"),
            *("workers", "overwrite", "resume", "tokenizer", "gguf_type", "keep_merged"),
            *("merge_base", "quant_type", "double_quant", "blocksize", "quantizer", "skip_modules"),
            *("expert_layout", "allow_nonfinite", "stream_base", "token", "push_to_hub"),
            *("private", "revision", "create_pr", "commit_message"),
            *("weights", "combine", "density", "seed", "svd_rank", "majority_sign_method", "scale", "verify"),
            *("executor", "ray_address", "device"),
        )
    }
    for name, value in options.items():
        if value in ([], "--"):  # older versions of argparse turn the dashes of `--base=--` into an empty list
            raise _UsageError(f"--{name.replace('_', '-')} is '--', expected a value (a folder of that name is ./--)")
    try:
        return make_request(arguments.adapter, **options)
    except RequestError as error:
        raise _UsageError(str(error)) from None


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; the documentation is made and checked with it."""
    parser = argparse.ArgumentParser(
        prog="loraweld", description="Merge an adapter into its base model and write one standalone model."
    )
    parser.add_argument("--version", action="version", version=f"loraweld {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    merge = commands.add_parser(
        "merge",
        help="merge adapters into their base model",
        description="Merge one or more PEFT adapters into their base model.",
        epilog="example: loraweld merge my-adapter -o my-model",
    )
    add_merge_arguments(merge)
    merge.set_defaults(run=_merge)
    plan = commands.add_parser(
        "plan",
        help="show what merge would do; writes nothing",
        description="Print what merge with the same arguments would do; reads headers only, writes nothing.",
        epilog="example: loraweld plan my-adapter -o my-model --json",
    )
    add_merge_arguments(plan)
    add_sizing_arguments(plan.add_argument_group("how long it would take on many machines"))
    plan.add_argument("--save", metavar="FILE", help="prepare the output, and save what run and publish need")
    plan.set_defaults(run=_plan)
    _add_parts(commands)
    extract = commands.add_parser(
        "extract",
        help="the way back: the adapter between a base and a tuned model",
        description="Write the LoRA adapter of low rank that leads from a base to a model that was tuned from it.",
        epilog="example: loraweld extract --base my-base --tuned my-model --rank 16 -o my-adapter",
    )
    add_extract_arguments(extract)
    extract.set_defaults(run=_extract)
    report = commands.add_parser(
        "report",
        help="an HTML page on what a merge changed",
        description="Write one HTML page, which needs no network: what was merged, how much each tensor changed, and "
        "what is left of the adapter's change.",
        epilog="example: loraweld report my-model -o report.html",
    )
    add_report_arguments(report)
    report.set_defaults(run=_report)
    _add_checks(commands)
    inspect = commands.add_parser(
        "inspect",
        help="say what a folder is",
        description="Say what a base, an adapter or an output is, from headers alone.",
        epilog="example: loraweld inspect my-adapter",
    )
    inspect.add_argument("path", metavar="PATH", help="a folder, a Hub id or a URL")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    return parser


def _add_parts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="make one part of a saved plan",
        description="Make one part of a plan that was saved, in any order and on any machine; again if need be.",
        epilog="example: loraweld run plan.json --part 3/64",
    )
    run.add_argument("plan", metavar="PLAN", help="what plan --save has written")
    run.add_argument("--part", required=True, metavar="I/N", help="which part of how many, such as 3/64")
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")
    run.set_defaults(run=_run)
    publish = commands.add_parser(
        "publish",
        help="let the output of a saved plan appear",
        description="Let the output of a saved plan appear once all parts are made; refused while one is missing.",
        epilog="example: loraweld publish plan.json",
    )
    publish.add_argument("plan", metavar="PLAN", help="what plan --save has written")
    add_telling(publish, "report")
    publish.set_defaults(run=_publish)
    discard = commands.add_parser(
        "discard",
        help="remove what a saved plan has made so far",
        description="Remove what the parts of a saved plan have made and nobody has published.",
        epilog="example: loraweld discard plan.json",
    )
    discard.add_argument("plan", metavar="PLAN", help="what plan --save has written")
    discard.set_defaults(run=_discard)


def _add_checks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verify = commands.add_parser(
        "verify",
        help="prove that a model is base + adapter",
        description="Read a merged model again, of any tool, and compare all of it with base + adapter in float64.",
        epilog="example: loraweld verify my-model --base my-base --adapter my-adapter",
    )
    add = verify.add_argument
    add("output", metavar="OUT", help="the merged model, a folder or URL")
    add("--sample", type=float, default=1.0, metavar="F", help="share of the rows to check (default: 1, all of them)")
    add(
        "--behaviour",
        metavar="PROMPTS",
        help="text file, one prompt a line: run base + adapter and the model on them too, and compare their logits",
    )
    add_sides(verify, base="that of loraweld.json, or the one the adapter names")
    add("--json", action="store_true", help="print the report as JSON on stdout")
    verify.set_defaults(run=_verify)
    compare = commands.add_parser(
        "compare",
        help="say how two models differ, tensor by tensor",
        description="Compare two models by the names of their tensors, or one with base + adapter as verify does; exit "
        "code 0 if all are equal (or rounded from base + adapter), 1 if not.",
        epilog="example: loraweld compare my-base my-model -o compare.html",
    )
    add = compare.add_argument
    add("first", metavar="A", help="a folder, Hub id or URL")
    add("second", nargs="?", metavar="B", help="a folder, Hub id or URL (default: base + adapter)")
    add("-o", "--output", metavar="PAGE", help="an HTML page too, as report writes it")
    add("--overwrite", action="store_true", help="replace a page that exists")
    add_sides(compare, base="that of loraweld.json, or the one the adapter names")
    add("--json", action="store_true", help="print the report as JSON on stdout")
    compare.set_defaults(run=_compare)
