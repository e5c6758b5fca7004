"""`eyas inspect`, `verify` and `gc`: for any store at a path or URL, without target or torch."""

import time
from typing import Annotated

import typer
from rich.progress import Progress

from deployments.cli.console import ERRORS, OUT, one_message
from storage.maintenance import OLDER_THAN_HOURS

# Stores import zarr and Arrow: only the commands that open one import them.

StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="Path or URL of a store, such as s3://bucket/llama3.")
]


def inspect(store: StoreArgument) -> None:
    """Show the contents of a store."""
    from flows.reports.inspection import inspect_store  # noqa: PLC0415 (see above)
    from flows.reports.store_tables import store_rows  # noqa: PLC0415 (see above)
    from flows.reports.table import print_table  # noqa: PLC0415 (see above)

    with one_message():
        figures = inspect_store(store)
        print_table(f"Store {store}", store_rows(figures))


def verify(
    store: StoreArgument,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte, not only names and sizes.")
    ] = False,
) -> None:
    """Check a store for damage; exit 1 if there is any."""
    from flows.reports.store_summaries import SIZES, VerifySummary  # noqa: PLC0415 (see above)
    from flows.reports.store_tables import verify_rows  # noqa: PLC0415 (see above)
    from flows.reports.table import print_table  # noqa: PLC0415 (see above)
    from storage.maintenance.verify import verify_store  # noqa: PLC0415 (see above)
    from storage.store import Store  # noqa: PLC0415 (see above)

    with one_message():
        started = time.monotonic()
        opened = Store.open(store)
        total = len(opened.shard_ids())
        with Progress(console=ERRORS, transient=True, disable=not ERRORS.is_terminal) as bar:
            row = bar.add_task("verifying", total=total)
            findings = verify_store(
                opened, deep=deep, recompute=None, on_shard=lambda _shard_id: bar.advance(row)
            )
        what = "every byte" if deep else SIZES
        summary = VerifySummary(
            store_root=store,
            what=what,
            num_shards=total,
            findings=tuple(findings),
            seconds=time.monotonic() - started,
        )
        print_table("Verification", verify_rows(summary))
    if findings:
        OUT.print("run: eyas repair RECIPE (the recipe this store was made with)")
        raise typer.Exit(code=1)
    deeper = "the semantic probe: eyas run verify RECIPE" if deep else "every byte: --deep"
    OUT.print(f"to check more, {deeper}")


def gc(
    store: StoreArgument,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SNAPSHOT",
            help="Keep only this snapshot, the latest and those younger than --older-than; may be "
            "repeated. By default gc keeps every snapshot that is not an earlier version of "
            "another one.",
        ),
    ] = None,
    drop_unfinished: Annotated[
        bool,
        typer.Option("--drop-unfinished", help="Abandon unfinished plans and drop their shards."),
    ] = False,
    release: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN", help="Release the snapshots of this run, whose folder is gone."
        ),
    ] = None,
    older_than: Annotated[
        float,
        typer.Option(
            metavar="HOURS",
            min=0,
            help="Keep younger objects: another process may be about to reference them. Use 0 if "
            "no run uses the store.",
        ),
    ] = OLDER_THAN_HOURS,
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete; without it, nothing is deleted.")
    ] = False,
) -> None:
    """List what no snapshot of a store needs; with --yes, delete it. Stop hidden-states first."""
    from flows.reports.store_tables import garbage_rows  # noqa: PLC0415 (see above)
    from flows.reports.table import print_table  # noqa: PLC0415 (see above)
    from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep  # noqa: PLC0415 (see above)
    from storage.store import Store  # noqa: PLC0415 (see above)

    with one_message():
        opened = Store.open(store)
        kept = snapshots_to_keep(
            opened, named=keep or (), released=release or (), older_than_hours=older_than
        )
        garbage = find_garbage(
            opened,
            keep=kept,
            keep_unfinished=not drop_unfinished,
            older_than_hours=older_than,
        )
        for run in (release or ()) if yes else ():
            opened.refs.release_all(run)
        if yes:
            collect(opened, garbage)
        print_table(f"Garbage in {store}", garbage_rows(garbage, kept, deleted=yes))
        if garbage and not yes:
            OUT.print("nothing was deleted; to delete it, add --yes")
