"""The options of the commands: their names and what the help says of them."""

from __future__ import annotations

import argparse

from loraweld.combine.methods import COMBINE_METHODS, MAJORITY_SIGN_METHODS
from loraweld.request import AS_GIVEN, CPU, DEVICES, DTYPES, NEAREST, QUANT_TYPES, ROUNDINGS
from loraweld.save_methods import SAVE_METHODS


def add_telling(parser: argparse.ArgumentParser, what: str) -> None:
    """How much is printed, and as what."""
    parser.add_argument("--json", action="store_true", help=f"print the {what} as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def add_sides(parser: argparse.ArgumentParser, *, base: str, adapter: str = "none") -> None:
    """What a model was merged from, and how."""
    add = parser.add_argument
    add("--base", metavar="BASE", help=f"folder, Hub id or URL (default: {base})")
    add(
        "--adapter",
        nargs="+",
        default=[],
        metavar="ADAPTER",
        help=f"what was merged, in order: folders, Hub ids or URLs (default: {adapter})",
    )
    add("--merge-base", metavar="WHICH", help="as given to merge (default: as-given)")
    add("--expert-layout", metavar="NAME", help="as given to merge (default: auto)")
    add("--tokenizer", metavar="PATH", help="as given to merge (default: the adapter's, else the base's)")
    add("--token", metavar="TOKEN", help="token of the Hub (default: the stored login, or HF_TOKEN)")
    how = parser.add_argument_group("how they were merged, where loraweld.json does not say")
    add_combining_arguments(how)
    how.add_argument("--rounding", metavar="NAME", help=f"as given to merge (default: {NEAREST})")


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", nargs="+", metavar="ADAPTER", help="PEFT adapter, a folder, Hub id or URL; several are combined")
    add("-o", "--output", metavar="OUT", help="folder for the model, or URL of one (s3://…); it appears when complete")
    add("--base", metavar="BASE", help="base model, a folder, Hub id or URL (default: the one the adapter names)")
    add(
        "--save-method",
        default="merged_16bit",
        metavar="METHOD",
        help=f"{', '.join(SAVE_METHODS)}; preserve goes back to the base's own encoding, gguf is for llama.cpp, "
        "lora is the adapter alone (default: %(default)s)",
    )
    add("--gguf-type", metavar="TYPE", help="with gguf: one or more of its types, e.g. q8_0,f16 (default: q8_0)")
    add("--keep-merged", action="store_true", help="with gguf: keep the merged model too, in OUT/merged")
    add(
        "--dtype",
        default="auto",
        metavar="DTYPE",
        help=f"dtype of the main weights: {', '.join(DTYPES)}; auto keeps 16 bit, else bfloat16 (default: %(default)s)",
    )
    add(
        "--rounding",
        default=NEAREST,
        metavar="NAME",
        help=f"{' or '.join(ROUNDINGS)}: up or down by chance, by --seed, so that changes below a step of 16 bit are "
        "kept in the mean (default: %(default)s)",
    )
    add(
        "--expert-layout",
        default="auto",
        metavar="NAME",
        help="how factors of square experts lie, where peft_version is not in the config: standard (A reads the last "
        "size) or swapped (default: %(default)s)",
    )
    add(
        "--allow-nonfinite",
        action="store_true",
        help="write weights that are infinite or not a number as they are, and say which (default: refuse them)",
    )
    add_running_arguments(parser)
    add_combining_arguments(parser.add_argument_group("strength, and several adapters"))
    add_encoding_arguments(parser.add_argument_group("quantised bases and outputs"))
    add_hub_arguments(parser.add_argument_group("the Hub"))
    add_machine_arguments(parser.add_argument_group("more than one machine"))
    add_telling(parser, "report")


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--max-shard-size",
        metavar="SIZE",
        help="repack into files of at most this size, e.g. 5GB (default: as the base)",
    )
    add(
        "--max-memory",
        default="512MB",
        metavar="SIZE",
        help="what the merge may allocate, besides about 250 MB for Python and torch (default: %(default)s)",
    )
    add("--workers", type=int, metavar="N", help="threads (default: 4)")
    add(
        "--device",
        default=CPU,
        metavar="DEVICE",
        help=f"{', '.join(DEVICES)}: where weights are quantised (4 and 8 bit, FP8) and decomposed (PiSSA, OLoRA); "
        "rows in 16 bit stay on the CPU, which keeps up with the disk (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace an output that exists")
    add(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="start afresh instead of continuing a killed run",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="folder or URL of the tokenizer to ship (default: the adapter's, else the base's)",
    )
    add(
        "--verify",
        action="store_true",
        help="check the output against float64 before it appears; refuse it if it fails",
    )


def add_machine_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--executor",
        default="local",
        metavar="NAME",
        help="local, or ray: parts of the merge become tasks of a Ray cluster (default: %(default)s)",
    )
    add("--ray-address", metavar="ADDR", help="of the cluster (default: RAY_ADDRESS, or one on this machine)")


def add_combining_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--scale", type=float, metavar="S", help="factor of what is merged, negative subtracts (default: 1)")
    add(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="a factor for each adapter, in order (default: 1)",
    )
    add(
        "--combine",
        metavar="METHOD",
        help=f"{', '.join(COMBINE_METHODS)}; sum adds what the adapters change, the others are those of PEFT, for LoRA "
        "only (default: sum)",
    )
    add("--density", type=float, metavar="D", help="share of values that ties, dare and magnitude_prune keep, e.g. 0.5")
    add("--seed", type=int, metavar="N", help="of stochastic rounding, and of the random choice of dare (default: 0)")
    add("--svd-rank", type=int, metavar="R", help="rank that svd methods keep (default: the largest of the adapters)")
    add(
        "--majority-sign-method",
        metavar="NAME",
        help=f"how ties elects signs: {' or '.join(MAJORITY_SIGN_METHODS)} (default: total)",
    )


def add_sizing_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--machines",
        type=int,
        nargs="+",
        metavar="N",
        help="print the time on so many machines, each with --workers threads, and what is slowest; several numbers",
    )
    add("--network-bandwidth", metavar="RATE", help="of a machine, each way, e.g. 2GB or 10Gbit (default: 10Gbit)")
    add("--disk-bandwidth", metavar="RATE", help="if each writes to a disk of its own (default: over the network)")
    add("--store-bandwidth", metavar="RATE", help="what all together read and write at most (default: no limit)")


def add_extract_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, metavar="BASE", help="the model to start from, a folder, Hub id or URL")
    add("--tuned", required=True, metavar="MODEL", help="the model to come to, a folder, Hub id or URL")
    add("-o", "--output", required=True, metavar="ADAPTER", help="folder for the adapter; it appears when complete")
    add("--rank", type=int, default=16, metavar="R", help="largest rank of a module (default: %(default)s)")
    add(
        "--energy",
        type=float,
        metavar="SHARE",
        help="of each module's change, e.g. 0.99: the smallest rank that keeps it, up to --rank (default: --rank)",
    )
    add(
        "--no-modules-to-save",
        dest="modules_to_save",
        action="store_false",
        help="refuse changed norms, biases and other tensors of no low rank instead of keeping them whole",
    )
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--token", metavar="TOKEN", help="token of the Hub (default: the stored login, or HF_TOKEN)")
    add_telling(parser, "report")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="the output of a merge, a folder, Hub id or URL")
    add("-o", "--output", default="report.html", metavar="PAGE", help="file for the page (default: %(default)s)")
    add("--run", dest="run_file", metavar="FILE", help="what merge --json printed, for the time it took")
    add("--overwrite", action="store_true", help="replace a page that exists")
    add_sides(parser, base="the one merged, where it is found", adapter="those merged, where they are found")
    add_telling(parser, "numbers")


def add_hub_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--push-to-hub",
        metavar="REPO_ID",
        help="upload to this repository, in one commit; without -o each file is sent as soon as it is complete, and "
        "nothing stays on this disk",
    )
    add(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="visibility of a new repository (default: the account's)",
    )
    add("--revision", metavar="BRANCH", help="branch to commit to, made if it is missing (default: main)")
    add("--create-pr", action="store_true", help="upload as a pull request")
    add("--commit-message", metavar="TEXT", help="first line of the commit")
    add("--token", metavar="TOKEN", help="token of the Hub (default: the stored login, or HF_TOKEN)")
    add(
        "--stream-base",
        action="store_true",
        help="read the base from the Hub by ranges, as it is needed; nothing of it is stored",
    )


def add_encoding_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--merge-base",
        default=AS_GIVEN,
        metavar="WHICH",
        help="as-given, or quantized-from[:BASE]: fold onto what a 4-bit model computes with, as in QLoRA training, in "
        "the modules that BASE (default: the base the adapter names) has in 4 bit (default: %(default)s)",
    )
    add("--quant-type", metavar="TYPE", help=f"codes of merged_4bit: {' or '.join(QUANT_TYPES)} (default: nf4)")
    add(
        "--no-double-quant",
        dest="double_quant",
        action="store_const",
        const=False,
        help="keep the block scales of merged_4bit in float32",
    )
    add("--blocksize", type=int, metavar="N", help="weights that share a scale in merged_4bit (default: 64)")
    add(
        "--quantizer",
        metavar="NAME",
        help="block scales of 4 bit: mse, of least squared error, or absmax, as bitsandbytes (default: mse)",
    )
    add(
        "--skip-modules",
        nargs="+",
        metavar="NAME",
        help="modules that stay in 16 bit besides embeddings and head: the end of their path, or its beginning",
    )
