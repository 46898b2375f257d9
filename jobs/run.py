"""A job from its spec to `_SUCCESS`, in the process that drives it.

Whatever happens on the way, what is staged and committed stands, and the same call goes on from there.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime

from deployments.board import posted
from deployments.config import Config
from deployments.pool import Running, attach, bring_up, take_down
from deployments.scheduling import give_way
from jobs.commit import commit_shard
from jobs.datapath import DataPath
from jobs.failures import receipts as _receipts
from jobs.lease import Fence, Lease
from jobs.ledger import Ledger
from jobs.plan import Plan, check_same_model, drop_other_plans, input_store, make_plan, write_plan
from jobs.prepare import Prepared, prepare
from jobs.receipts import OnProgress, Progress, Receipt, Tally
from jobs.report import Report
from jobs.spec import JobPaths
from jobs.totals import read_totals, write_tally
from pipeline.counts import Counts
from pipeline.errors import JobError
from pipeline.model_info import ModelInfo
from pipeline.shards import Shard
from pipeline.storage import Store
from pipeline.witness import Witnessed

COMMITS_AT_ONCE, COMMITS_PENDING = 4, 32
PROGRESS_EVERY_S = 1.0


def run_job(
    job: Prepared,
    config: Config,
    on_progress: OnProgress = lambda progress: None,
    *,
    max_error_share: float | None = None,
) -> Report:
    """Runs the job, or goes on with it, on the Ray and Serve that this process has joined.

    `max_error_share` is the share of images, 0 to 1, that may fail; None for any.

    Raises `OutputConflict` where another model would score the rest, `ModelError`, `PoolError`, `JobError`.
    """
    if job.report is not None:
        return job.report
    give_way()
    with posted(output=job.store.url, model=job.spec.model) as post:

        def tell(progress: Progress) -> None:
            on_progress(progress)
            post(progress.to_dict())

        return _run_job(job, config, tell, max_error_share)


def _run_job(job: Prepared, config: Config, tell: OnProgress, max_error_share: float | None) -> Report:
    started = time.monotonic()
    tell(Progress(phase="pool", shards=len(job.found)))
    with Lease(job.store, job.names, looked_s=job.looked_s) as lease:
        if lease.stale:
            job = prepare(job.spec)
            if job.report is not None:
                return job.report
        with _pool(job.spec.model, config) as pool:
            plan = job.plan
            if plan is None:
                plan = make_plan(job.spec, job.found, job.carried, pool.info)
                lease.check()  # a pool takes its time to come up
                plan = write_plan(job.store, plan)
            check_same_model(plan, pool.info, job.spec.output)
            run = _Run(plan, job.store, lease, Ledger(plan.shards, job.names), tell, witness=job.witness)
            run.score(pool, max_error_share)
            return run.finish(time.monotonic() - started, pool)


@contextmanager
def _pool(model: str, config: Config) -> Iterator[Running]:
    """The running pool of the model, or one brought up for as long as the context lasts."""
    if running := attach(model):
        yield running
        return
    try:
        yield bring_up(model, config.pool)
    finally:
        take_down(model)


class _Run:
    """One driver's work on a job."""

    def __init__(
        self, plan: Plan, store: Store, lease: Lease, ledger: Ledger, on_progress: OnProgress, *, witness: str = ""
    ) -> None:
        self._plan, self._store, self._lease = plan, store, lease
        self._ledger, self._on_progress, self._witness = ledger, on_progress, witness
        self._resumed = ledger.done
        self._bytes_total = sum(shard.size for shard in plan.shards)
        self._bytes_done = sum(shard.size for shard in plan.shards if ledger.committed(shard.number))
        self._tally = Tally()
        self._commits: dict[Future[Counts], Shard] = {}
        self._saved = ledger.done  # shards that the tally in OUTPUT covers
        self._told_s = 0.0

    def score(self, pool: Running, max_error_share: float | None) -> None:
        """Scores and commits all shards that are not committed yet.

        Raises `JobError` where too many images failed, in this run or an earlier one, or none was scored.
        """
        for shard in self._ledger.leftovers():
            self._store.delete(self._ledger.names(shard))
            self._ledger.commit(shard)
        self._tally.committed = read_totals(self._store, self._plan.shards, self._ledger.committed_shards())
        self._tally.check_errors(max_error_share)
        with ThreadPoolExecutor(COMMITS_AT_ONCE, thread_name_prefix="tandem-commit") as threads:
            for shard in self._ledger.ready():
                self._commit(threads, self._plan.shards[shard])
            work = self._work()
            self._tally.started_s = time.monotonic()
            if work:
                for receipt in _receipts(self._path(pool.info), work, pool.config):
                    self._take(receipt, threads)
                    self._tally.check_errors(max_error_share)
            self._reap(pending=0)
        if missing := len(self._plan.shards) - self._ledger.done:
            raise JobError(f"{missing} shards are not complete; submit the job again to resume it")
        self._save_tally()
        self._tally.check_errors(max_error_share, at_least=0)
        self._tally.check_scored()

    def finish(self, seconds: float, pool: Running) -> Report:
        """Writes `_SUCCESS`, which is what marks a finished job, and returns the report."""
        self._lease.check()
        self._empty_stage()
        drop_other_plans(self._store)
        elapsed_s, counts = self._tally.elapsed_s(), self._tally.committed
        report = Report(
            output=self._store.url,
            model=self._plan.spec.model,
            revision=self._plan.revision,
            shards=len(self._plan.shards),
            resumed=self._resumed,
            images=counts.rows,
            scored=counts.scored,
            errors=counts.errors,
            skipped=self._skipped(counts),
            run_images=self._tally.run_images,
            seconds=round(seconds, 3),
            startup_s=round(seconds - elapsed_s, 3),
            images_per_s=round(self._tally.run_images / elapsed_s, 1),
            replicas=dict(self._tally.replicas),
            stage_seconds={stage: round(spent, 3) for stage, spent in self._tally.stage_seconds.items()},
            pool=pool.chosen,
        )
        self._tell("done")
        self._store.write(JobPaths.SUCCESS, json.dumps(report.to_dict(), indent=2).encode())
        return report

    def _empty_stage(self) -> None:
        """Deletes what is staged still: by a worker that was tried again while another had done the same."""
        self._store.delete(info.name for info in self._store.list(JobPaths.STAGE))
        self._store.sweep()

    def _path(self, info: ModelInfo) -> DataPath:
        spec = self._plan.spec
        return DataPath(
            source=Witnessed(input_store(spec), self._witness),
            target=self._store,
            columns=spec.columns,
            carried=self._plan.carried,
            limits=spec.limits,
            fence=Fence(self._store, self._lease.owner),
            model=spec.model,
            scores_as=info.scores_as,
            transform=info.transform,
            labels=info.labels,
            top_k=min(spec.top_k, len(info.labels)),
        )

    def _work(self) -> list[tuple[Shard, frozenset[int]]]:
        under_way = {shard.number for shard in self._commits.values()}
        return [
            (shard, self._ledger.staged(shard.number))
            for shard in self._plan.shards
            if shard.number not in under_way and not self._ledger.committed(shard.number)
        ]

    def _take(self, receipt: Receipt, threads: ThreadPoolExecutor) -> None:
        if not self._ledger.committed(receipt.shard):  # or a late try staged again what counts already
            self._tally.add(receipt)
        if self._ledger.stage(receipt.shard, receipt.chunk, receipt.last):
            self._commit(threads, self._plan.shards[receipt.shard])
        self._reap(pending=COMMITS_PENDING)
        if time.monotonic() - self._told_s > PROGRESS_EVERY_S:
            self._tell("score")

    def _commit(self, threads: ThreadPoolExecutor, shard: Shard) -> None:
        self._lease.check()
        names = self._ledger.names(shard.number)
        self._commits[threads.submit(commit_shard, self._store, self._plan, shard, names)] = shard

    def _reap(self, *, pending: int) -> None:
        """Takes note of the commits that are done, and waits for some where more than `pending` are not."""
        while self._commits:
            patience_s = 0 if len(self._commits) <= pending else None
            done = wait(self._commits, timeout=patience_s, return_when=FIRST_COMPLETED).done
            if not done:
                return
            for future in done:
                counts = future.result()
                shard = self._commits.pop(future)
                self._ledger.commit(shard.number)
                self._tally.commit(shard.number, counts)
                self._bytes_done += shard.size

    def _skipped(self, counts: Counts) -> dict[str, int]:
        return dict((counts.skipped + Counter(self._plan.skipped)).most_common())

    def _save_tally(self) -> None:
        if self._saved < self._ledger.done:
            write_tally(self._store, self._ledger.committed_shards(), self._tally.committed)
            self._saved = self._ledger.done

    def _tell(self, phase: str) -> None:
        counts = self._tally.counts
        progress = Progress(
            phase=phase,
            shards=len(self._plan.shards),
            shards_done=self._ledger.done,
            images=counts.rows,
            scored=counts.scored,
            errors=counts.errors,
            skipped=self._skipped(counts),
            run_images=self._tally.run_images,
            bytes_total=self._bytes_total,
            bytes_done=self._bytes_done,
            elapsed_s=round(self._tally.elapsed_s(), 3),
        )
        self._told_s = time.monotonic()
        self._on_progress(progress)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._store.write(JobPaths.PROGRESS, json.dumps({"updated_at": now, **progress.to_dict()}, indent=2).encode())
        self._save_tally()
