"""`router-tuning patch`: patches for a checkpoint that is there, routed or static, in place or into another one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from vllm_mod.calibration import CALIBRATION_FILE
from vllm_mod.checkpoint import (
    ROUTER_CONFIG_FILE,
    ROUTERS_FILE,
    check_replaceable,
    is_router_only,
    read_routers,
    replace_routers,
)
from vllm_mod.evaluation import EVALUATION_FILE
from vllm_mod.files import ADAPTER_FILES, atomic_directory, link_or_copy, model_files
from vllm_mod.trainer_log import LOG_FILE

from . import card
from .arguments import PatchArguments, check_output
from .data import calibration_samples, check_sources
from .export import shape_of
from .interrupt import deferred
from .loading import base_of, checkpoint_config, fitting_dtype, load_routed, stored_dtype
from .lora import ADAPTER_DIR
from .model import patch_weights
from .patch_record import PatchRecord, fitted_on
from .patches import check_rank, collate, with_patch
from .patching import beside, make_patches, unfinished
from .plot import PLOT_FILE
from .preflight import check_vocabulary, check_writable
from .records import ARGUMENTS_FILE

log = logging.getLogger(__name__)

_RECORDS = ("train_command.txt", ARGUMENTS_FILE, LOG_FILE, PLOT_FILE, CALIBRATION_FILE)


def patch(args: PatchArguments, command: str) -> tuple[PatchRecord, Path]:
    """Fit, write, record. Returns what patches.json holds, and where the patches are.

    Raises ConfigError, with nothing written, on anything that cannot be patched.
    """
    directory, stored = checkpoint_config(args.checkpoint, args.model)
    check_replaceable(directory)
    card.render(directory)  # a record that cannot be read is no surprise after the work
    output = directory if args.output is None else Path(args.output)
    if args.output is not None:
        check_output(output)
    place = check_writable(output, output.absolute() if args.output is None else output.absolute().parent)
    check_sources(args.data)
    base = base_of(directory, stored, args.model)
    shape = shape_of(base)
    check_rank(args.rank, stored, shape.hidden_size, "--rank")
    routers = read_routers(directory, stored, shape)
    samples, counts = calibration_samples(args, base)
    check_vocabulary(base, samples)
    batches = collate(samples, stored, args.rank, args.batch_size, ", ".join(args.data))
    model = load_routed(directory, base, with_patch(stored, None), fitting_dtype(base, args.bf16))
    # In place it lies inside: what is beside the checkpoint may not be writable.
    path = directory / "patches.unfinished" if args.output is None else beside(output)
    file = unfinished(path, model, samples, args.rank, args, args.batch_size)
    with file.named_on_interrupt():
        record = make_patches(model, samples, batches, args.rank, args, place, command, counts.to_dict(), file)
        record = record.also_fitted_on(fitted_on(directory))  # which its routers may have been, and stay
        config = with_patch(stored, args.rank)
        patches = patch_weights(model, stored_dtype(base))
        with deferred():
            with nullcontext(directory) if args.output is None else _copy(directory, output) as target:
                replace_routers(target, config, routers, patches)
                record.write(target)
                _set_evaluation_aside(target)
                card.write(target)
            file.remove()
    if not stored.is_static and stored.window is None and (directory / CALIBRATION_FILE).is_file():
        log.warning("%s: patches change what later layers decide on; run router-tuning calibrate again", output)
    return record, output


def report(record: PatchRecord, output: Path) -> None:
    record.report()
    print(f"written: {output}")


def _set_evaluation_aside(directory: Path) -> None:
    path, aside = directory / EVALUATION_FILE, directory / "evaluation.before_patch.json"
    if path.is_file():
        path.replace(aside)
        log.warning("%s was measured without these patches; it is %s now", path, aside.name)


@contextmanager
def _copy(directory: Path, output: Path) -> Iterator[Path]:
    """A copy of a checkpoint, its records included but for its evaluation, that appears whole or not at all."""
    own = [ROUTER_CONFIG_FILE, ROUTERS_FILE, card.CARD_FILE] if is_router_only(directory) else model_files(directory)
    names = [*own, *_RECORDS, *(f"{ADAPTER_DIR}/{name}" for name in ADAPTER_FILES)]
    with atomic_directory(output) as copy:
        for name in names:
            if (directory / name).is_file():
                link_or_copy(directory / name, copy / name)
        yield copy
