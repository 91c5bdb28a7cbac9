"""A training stage from the driver's side: the run folder, the launch, the pictures."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

from rich.console import Console

from dmpo_dist.artifacts.dataset import DatasetCard
from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.files import remove_left_overs, whole_folder
from dmpo_dist.artifacts.locks import only_one
from dmpo_dist.artifacts.run_folder import failure_noted
from dmpo_dist.commands.run_folder import (
    is_finished,
    last_checkpoint,
    open_run_folder,
    reopen_run_folder,
    require_same_start,
)
from dmpo_dist.config import RunConfig, TemplateConfig
from dmpo_dist.config.model import CANDIDATES, PLACEHOLDER
from dmpo_dist.data.prompt_texts import require_fields
from dmpo_dist.data.reorder import require_histories
from dmpo_dist.data.store import PreparedData, texts_of_data, unlike_preparation
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import (
    enforce_template,
    find_model,
    load_tokenizer,
    lora_without_effect,
    make_scratch_model,
    read_model_config,
    require_same_rendering,
    unlike_training,
    with_length_of,
    write_stamp,
)
from dmpo_dist.modeling.memory import give_back
from dmpo_dist.modeling.model_files import start_digests, written_digests
from dmpo_dist.records.log import RunLog
from dmpo_dist.records.sinks import Sink
from dmpo_dist.records.tracking import check_tracking
from dmpo_dist.training.engine import resolve_config
from dmpo_dist.training.groups import make_schedule, require_levels, require_negatives
from dmpo_dist.training.job import Job, Kind
from dmpo_dist.training.listed import require_lists
from dmpo_dist.training.on_policy import require_on_policy
from dmpo_dist.training.runtime import Runtime
from dmpo_dist.training.schedule import total_steps

T = TypeVar("T")

SCRATCH = "scratch"


def run_stage(kind: Kind, config: RunConfig, console: Console, resume: bool = False, overwrite: bool = False) -> Path:
    """Run one training stage and return its model folder.

    Under torchrun (RANK is set) this process is one rank; otherwise Ray starts the ranks.

    Args:
        overwrite: remove an earlier run in ``output_dir`` once all that can be checked is found right.

    Raises:
        UserError: see ``open_run_folder``, ``preflight`` and ``training.worker.run``.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from dmpo_dist.training.worker import run

        job, _ = as_rank(kind, config, console, resume, run, overwrite)
        return job.output / "model"
    from dmpo_dist.cluster.gauges import RayGauges
    from dmpo_dist.cluster.train import ray_session, train_with_ray

    job = preflight(kind, config, resume, overwrite=overwrite)
    if job.finished:
        _say_finished(job, console)
        return job.output / "model"
    _note_differences(job, console, resume)
    with (
        one_writer(job),
        failure_noted(job.output),
        ray_session(job.config.cluster),
        RunLog(job, console, resume, [RayGauges(job)]) as log,
    ):
        train_with_ray([job], lambda _, record: log(record))
    return job.output / "model"


def _say_finished(job: Job, console: Console) -> None:
    text = (
        f"{job.output} is finished, and its model is whole: nothing is left to train. To train it for longer, raise "
        f"{job.section}.steps or {job.section}.epochs"
    )
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _note_differences(job: Job, console: Console, resume: bool) -> None:
    """Say so where the stage uses its start or its data otherwise than these were made, or resumes without a
    checkpoint."""
    if resume and not job.checkpointed:
        console.print("note: no checkpoint was left, so the run begins again at step 0", highlight=False)
    source = find_model(job.start)
    for difference in unlike_training(source, job.config.model):
        console.print(f"note: {job.start} was trained with {difference}", highlight=False, soft_wrap=True)
    for difference in lora_without_effect(source, job.config.model):
        console.print(f"note: {difference}", highlight=False, markup=False, soft_wrap=True)
    if job.config.data.path is not None:
        card = DatasetCard.read(job.config.data.path)
        notes = unlike_preparation(job.config.data, card)
        if job.stage.select == "best" and not card.counts.get("validation"):
            notes.append(f"{job.config.data.path} has no validation requests to choose a step by: the last is kept")
        for note in notes:
            console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def run_stages(stages: Sequence[tuple[str, Kind, RunConfig]], console: Console) -> None:
    """Run several training stages on one set of Ray workers, which then start only once.

    Args:
        stages: for each a heading to show, its kind and its configuration; ``model.path`` of a later one may be the
            ``output_dir/model`` of an earlier one, whose template it must share.
        console: where to show them.

    Raises:
        UserError: see ``run_stage``; what earlier stages wrote stays.
    """
    from dmpo_dist.cluster.train import ray_session, train_with_ray

    jobs: list[Job] = []
    for _, kind, config in stages:
        jobs.append(preflight(kind, config, resume=False, earlier=jobs))
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(one_writer(job))
        stack.enter_context(ray_session(jobs[0].config.cluster))
        train_with_ray(jobs, stack.enter_context(_StageLogs(jobs, [heading for heading, *_ in stages], console)))


@contextmanager
def one_writer(job: Job) -> Iterator[None]:
    """Within, this process alone writes to the run's folder, which is free of what killed ones left half-written.

    Raises:
        UserError: another process trains there, such as a rank that outlived its launcher.
    """
    with only_one(job.output):
        for folder in (job.output, job.output / "checkpoints"):
            remove_left_overs(folder)
        yield


class _StageLogs:
    """One ``RunLog`` at a time, for the job the workers are at."""

    def __init__(self, jobs: Sequence[Job], headings: Sequence[str], console: Console) -> None:
        self._jobs, self._headings, self._console = jobs, headings, console
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._begin(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(self, job: int, record: dict[str, Any]) -> None:
        if job > self._current:  # the end of the one before got lost with a worker
            self._next(job)
        self._log(record)
        if record["kind"] == "end" and job + 1 < len(self._jobs):
            self._next(job + 1)

    def _next(self, job: int) -> None:
        self._open.close()
        self._begin(job)

    def _begin(self, job: int) -> None:
        from dmpo_dist.cluster.gauges import RayGauges

        self._current = job
        begun = self._jobs[job]
        environment = None if begun.inputs else Environment.read_if_there(begun.output)
        if environment is not None:  # the model it starts from, made by an earlier job, is there by now
            with_start(begun, environment)
        say(self._console, self._headings[job])
        log = RunLog(self._jobs[job], self._console, sinks=[RayGauges(self._jobs[job])])
        self._log = self._open.enter_context(log)


def say(console: Console, text: str) -> None:
    """A line that announces a part of the work."""
    console.print(text, style="bold", highlight=False, markup=False)


def preflight(kind: Kind, config: RunConfig, resume: bool, earlier: Sequence[Job] = (), overwrite: bool = False) -> Job:
    """Check what can be checked before any worker starts, open the run folder and make a model from scratch if asked.

    Args:
        kind, config, resume, overwrite: see ``run_stage``.
        earlier: jobs that will run before, one of which may make the model this one starts from.

    Returns:
        The job, its configuration with absolute paths and the model's own template.
    """
    job, data = checked_job(kind, config, earlier)
    config, start = job.config, job.start

    def steps_of(config: RunConfig) -> int:
        return _steps(replace(job, config=config), len(data.train))

    if resume:
        environment = reopen_run_folder(job, data.fingerprint, steps_of)
    else:
        open_run_folder(config, job.section, resume, data.fingerprint, overwrite)
        environment = Environment.read(config.output_dir)
    if config.model.path == SCRATCH and not Path(start).exists():
        with failure_noted(config.output_dir):
            make_start(Path(start), config, data)
    known = job if start in {str(other.output / "model") for other in earlier} else with_start(job, environment)
    checkpointed = last_checkpoint(job.output) if resume else 0
    finished = resume and is_finished(job.output, steps_of(config))
    return replace(known, run_id=environment.run_id, checkpointed=checkpointed, finished=finished)


def checked_job(kind: Kind, config: RunConfig, earlier: Sequence[Job] = ()) -> tuple[Job, PreparedData]:
    """The job of a stage and its data, once all that needs neither weights nor the run folder is found right.

    Args:
        kind, config, earlier: see ``preflight``.
    """
    data = PreparedData.for_training(config.data)
    config = with_absolute_paths(config)
    if config.model.path == SCRATCH:
        start = str(config.output_dir / SCRATCH)
    else:
        folder = Path(config.model.path).absolute()
        maker = next((job for job in earlier if job.output / "model" == folder), None)
        start = str(folder) if folder.exists() or maker else config.model.path
        if not maker:
            config = with_length_of([find_model(start)], config)
        template = maker.config.template if maker else template_of(start, config)
        config = config.model_copy(update={"template": template})
    job = Job(kind, config, start, config.output_dir)
    _check_plan(job, data)
    check_tracking(config.tracking)
    return job, data


def with_start(job: Job, environment: Environment) -> Job:
    """``job`` with fingerprints of its data and its starting model, which exists by now, taken down in its folder.

    Raises:
        UserError: the run is resumed and its starting model is another.
    """
    now = start_digests(find_model(job.start))
    require_same_start(environment.start_digests, now, job)
    if environment.start_digests != now:
        environment.model_copy(update={"start_digests": now}).write(job.output)
    return replace(job, inputs={"data": environment.data_fingerprint, "model": now})


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """``config``, which has a ``data.path``, with the paths that workers read or write made absolute; URIs stay."""
    assert config.data.path is not None
    data = config.data.model_copy(update={"path": config.data.path.absolute()})
    is_file = config.deepspeed.endswith(".json")
    deepspeed = str(Path(config.deepspeed).absolute()) if is_file else config.deepspeed
    reference = config.reference
    if reference.path is not None:
        reference = reference.model_copy(update={"path": reference.path.absolute()})
    cluster = config.cluster.model_copy(update={"storage_path": absolute_storage(config.cluster.storage_path)})
    paths = {"output_dir": config.output_dir.absolute(), "data": data, "deepspeed": deepspeed}
    return config.model_copy(update=paths | {"reference": reference, "cluster": cluster})


def absolute_storage(storage: str | None) -> str | None:
    """``cluster.storage_path`` as Ray takes it: a folder by its absolute path, a bucket by its URI."""
    return storage if storage is None or "://" in storage else str(Path(storage).expanduser().absolute())


def template_of(model: str, config: RunConfig) -> TemplateConfig:
    """The template to use with ``model`` (folder or hub id), after every check of it that needs no weights.

    Raises:
        UserError: it is missing or damaged, was trained with another template than ``config`` asks for, or its context
            or tokenizer will not do.
    """
    source = find_model(model)
    read_model_config(source.base, config.model.max_length)
    template = enforce_template(source.stamp, config.template, model)
    tokenizer = load_tokenizer(source)
    made = GroupTokenizer(tokenizer, make_template(template, tokenizer), config.model.max_length).template
    require_same_rendering(source.stamp, made, model)
    return template


def _check_plan(job: Job, data: PreparedData) -> None:
    """Whether the data is enough for the plan, and DeepSpeed's configuration one we can train by."""
    config, workers = job.config, job.config.cluster.workers
    make_schedule(job, len(data.train), workers)
    require_rows(job, data)
    resolve_config(config.deepspeed, job.stage, config.model.dtype, workers, parameters=0)


def require_rows(job: Job, data: PreparedData) -> None:
    """Raise UserError where the rows of ``data`` are none that ``job`` can train on."""
    config = job.config
    require_fields(config.template, data.items, data.users, str(data.path))
    require_lists(job, data)
    if job.kind == "preference":
        require_levels(job.loss, config.objective.name, data)  # the loss: refuses a class that cannot be loaded
        require_negatives(data.stored_negatives(), config.train.negatives, fixed_rows=data.ragged)
        require_on_policy(job, data)
    elif config.sft.history_order == "shuffled":
        require_reorderable(config, data)


def _steps(job: Job, groups: int) -> int:
    return total_steps(job.stage, make_schedule(job, groups, job.config.cluster.workers))


def require_reorderable(config: RunConfig, data: PreparedData) -> None:
    """Raise UserError where SFT cannot draw a new order of histories in every epoch."""
    require_histories(data.train["prompt"])
    if data.card.config.get("repeats") == "keep":
        raise UserError(
            "sft.history_order=shuffled draws new positives among distinct titles, but the data was prepared with "
            "data.repeats=keep; set sft.history_order=given"
        )
    if any(data.lists()):
        raise UserError(
            "sft.history_order=shuffled draws new positives among distinct titles, but the training groups have "
            "several positives or levels (data.levels); set sft.history_order=given"
        )
    budget, longest = config.sft.token_budget, config.model.max_length
    if budget != "auto" and budget < longest:
        raise UserError(
            f"sft.token_budget={budget}, but with sft.history_order=shuffled a group may come to take "
            f"model.max_length={longest} tokens; raise sft.token_budget or lower model.max_length"
        )


def make_start(folder: Path, config: RunConfig, data: PreparedData) -> None:
    """A random model for ``model.path: scratch``, its tokenizer learned from the titles and the template's texts."""
    if data.items is None:
        raise UserError("model.path is scratch, but the data has no catalogue to learn a tokenizer from; give a model")
    template = config.template
    parts = [template.preamble, template.item, *template.request.split(CANDIDATES)]
    if template.lists_candidates:
        parts.append(template.candidate)
    fixed = [PLACEHOLDER.sub("", part) for part in parts]
    texts = data.items["title"].tolist() + [text for text in fixed if text.strip()] * 8
    texts += texts_of_data(template, data).texts()
    with whole_folder(folder) as part:
        make_scratch_model(part, config.model.scratch, texts, config.model.max_length, config.seed)
        length = config.model.max_length
        write_stamp(part, config.template, stage="untuned", max_length=length, digests=written_digests(part))


def as_rank(
    kind: Kind,
    config: RunConfig,
    console: Console,
    resume: bool,
    body: Callable[[Job, Runtime], T],
    overwrite: bool = False,
    sinks: Sequence[Sink] = (),
    again: bool = False,
) -> tuple[Job, T | None]:
    """Run ``body`` in this process as one rank of torchrun or srun; rank 0 checks the job and owns the run folder.

    Args:
        sinks: get the run's records beside its own files.
        again: run a resumed job that is finished from its latest checkpoint on, so that the sinks get its records.

    Returns:
        The job, and what ``body`` returns; None where the job is finished already.

    Raises:
        UserError: ``cluster.storage_path`` is set, which only Ray uses, or GPUs are to stay unused, which only Ray sees
            to; see also ``run_stage``.
    """
    from dmpo_dist.training.engine import start_process_group
    from dmpo_dist.training.runtime import ProcessRuntime, from_rank_zero

    workers = {"workers": int(os.environ["WORLD_SIZE"]), "fewest_workers": None}
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=workers)})
    own = None
    if os.environ["RANK"] == "0":
        _require_no_storage(config)
        _require_no_hidden_gpu(config)
        own = preflight(kind, config, resume, overwrite=overwrite)
    with ExitStack() as stack:
        stack.callback(give_back)
        if own is not None and (again or not own.finished):
            _note_differences(own, console, resume)
            stack.enter_context(one_writer(own))
            stack.enter_context(failure_noted(own.output))
        start_process_group()
        job = from_rank_zero(own)
        assert job is not None
        if job.finished and not again:
            if own is not None:
                _say_finished(job, console)
            return job, None
        log = (lambda record: None) if own is None else stack.enter_context(RunLog(job, console, resume, sinks))
        folder = job.output / "checkpoints"
        return job, body(job, ProcessRuntime(folder, job.stage.keep_checkpoints, log, job.run))


def _require_no_hidden_gpu(config: RunConfig) -> None:
    import torch

    if config.cluster.gpus_per_worker == 0 and torch.cuda.is_available():
        raise UserError(
            "cluster.gpus_per_worker=0 has no effect without Ray (under torchrun or srun, and from Python with one "
            "worker), and this machine has GPUs, which would be used; set CUDA_VISIBLE_DEVICES to nothing before the "
            "start, or leave it out (cluster.gpus_per_worker=null)"
        )


def _require_no_storage(config: RunConfig) -> None:
    storage = config.cluster.storage_path
    if storage is not None:
        raise UserError(
            f"cluster.storage_path={storage} has no effect without Ray (under torchrun or srun, and from Python with "
            "one worker): checkpoints go to output_dir/checkpoints; leave it out (cluster.storage_path=null), or let "
            "Ray start the workers"
        )
