"""The `tandem` command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import click

from deployments.config import check_exposure, load_config, with_keys, with_routes_of_container
from deployments.web.keys import Scope, new_key
from jobs.screen import Screen, own_screen
from jobs.spec import JobSpec, portable
from pipeline import __version__
from pipeline.errors import JobError, TandemError, UsageError
from pipeline.inputs.sample import Columns, KeyUntil
from pipeline.shards import FORMATS
from pipeline.storage import absolute

DONE, FAILED, WRONG_USAGE = 0, 1, 2

Command = TypeVar("Command", bound=Callable[..., Any])


def _json(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")(command)


def _address(command: Command) -> Command:
    text = "The job API of a running cluster, such as http://HEAD:8265."
    return click.option("--address", metavar="ADDRESS", envvar="RAY_API_SERVER_ADDRESS", help=text)(command)


def _config(command: Command) -> Command:
    text = "YAML with the sections pool and endpoint; see docs/configuration.md."
    return click.option("--config", "config_file", metavar="FILE", help=text)(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tandem")
def cli() -> None:
    """Scores images with vision transformers, offline and online, on one pool of model actors."""


@cli.command()
@_json
def demo(as_json: bool) -> None:
    """Score 1,797 handwritten digits, by a batch job and over HTTP at once, on this machine."""
    with _screen(as_json) as screen:
        from jobs.demo import run_demo

        run_demo(screen)


@cli.command()
@click.option("--model", required=True, metavar="MODEL", help="A hub id, or a folder made by save_pretrained.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="The port to listen on.",
    envvar=["AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT"],
)  # fmt: skip
@click.option(
    "--keys", "keys_file", metavar="FILE", envvar="TANDEM_KEYS_FILE",
    help="Lines of tandem key: requests need one of these keys.",
)  # fmt: skip
@click.option("--allow-anonymous", is_flag=True, help="Ask for no key, also where other machines reach the endpoint.")
@_config
@_address
def serve(
    model: str, host: str, port: int, keys_file: str | None, allow_anonymous: bool, config_file: str | None,
    address: str | None,
) -> None:  # fmt: skip
    """Keep an endpoint up: here until Ctrl-C, or in the cluster at ADDRESS."""
    config = with_keys(load_config(config_file), keys_file, os.environ)
    config = with_routes_of_container(config, os.environ)
    check_exposure(host, config, allow_anonymous=allow_anonymous)
    with _screen(as_json=False) as screen:
        from jobs.serving import serve_here, serve_there

        if address:
            serve_there(screen, portable(model), host, port, config, address)
        else:
            serve_here(screen, portable(model), host, port, config)


@cli.command()
@click.argument("source", metavar="INPUT")
@click.argument("target", metavar="OUTPUT")
@click.option("--model", required=True, metavar="MODEL", help="A hub id, or a folder made by save_pretrained.")
@click.option(
    "--format", "input_format", default="auto", show_default=True, type=click.Choice(["auto", *FORMATS]),
    help="What INPUT holds; auto tells it by the names.",
)  # fmt: skip
@click.option("--top-k", default=5, show_default=True, type=click.IntRange(1, 1000), help="Classes for each image.")
@click.option(
    "--carry", multiple=True, metavar="NAME",
    help="Carry a Parquet column, or a tar's members of this suffix, into the output. Can be repeated.",
)  # fmt: skip
@click.option("--image-column", metavar="NAME", help="The Parquet column of images, where several could be.")
@click.option("--key-column", metavar="NAME", help="The Parquet column of keys, where it is not key or id.")
@click.option(
    "--key-until", default="first-dot", show_default=True, type=click.Choice(get_args(KeyUntil)),
    help="The dot of a tar member's file name at which its key ends: last-dot for names such as 12.30.15.jpg.",
)  # fmt: skip
@click.option(
    "--max-error-share", metavar="SHARE", type=click.FloatRange(0, 1),
    help="Stop the job when more than this share of its images fails, such as 0.01; any share may fail otherwise.",
)  # fmt: skip
@click.option("--wait", is_flag=True, help="Follow the job to its end. On this machine, it ends with the command.")
@_config
@_json
@_address
def submit(
    source: str, target: str, model: str, input_format: str, top_k: int, carry: tuple[str, ...],
    image_column: str | None, key_column: str | None, key_until: KeyUntil, max_error_share: float | None, wait: bool,
    config_file: str | None, as_json: bool, address: str | None,
) -> None:  # fmt: skip
    """Score all images under INPUT into Parquet under OUTPUT; both are s3:// or local.

    Submitted again on an unfinished OUTPUT, the job goes on where it was.
    """
    spec = JobSpec(
        input=absolute(source),
        output=absolute(target),
        model=portable(model),
        format=None if input_format == "auto" else input_format,  # type: ignore[arg-type]
        top_k=top_k,
        columns=Columns(image=image_column, key=key_column, carry=carry, key_until=key_until),
    )
    config = load_config(config_file)
    with _screen(as_json) as screen:
        from jobs.submit import submit_job

        submit_job(screen, spec, config, max_error_share=max_error_share, address=address, wait=wait)


@cli.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The endpoint.")
@click.option("--top-k", default=5, show_default=True, type=click.IntRange(1, 1000), help="Classes for each image.")
@_json
def score(images: tuple[str, ...], url: str, top_k: int, as_json: bool) -> None:
    """Score image files at a running endpoint."""
    from jobs.score import score_files

    screen = Screen(sys.stdout, sys.stderr, as_json=as_json)
    if not score_files(screen, images, url, top_k):
        raise JobError("not all images were scored")


@cli.command()
@click.argument("name")
@click.option(
    "--scope", "scopes", multiple=True, default=[Scope.PREDICT.value], show_default=True,
    type=click.Choice([scope.value for scope in Scope]), help="What the key is for. Can be repeated.",
)  # fmt: skip
@_json
def key(name: str, scopes: tuple[str, ...], as_json: bool) -> None:
    """Make an API key for NAME: a line for the file of keys, and, on standard error, the key itself, this once."""
    secret, made = new_key(name, map(Scope, scopes))
    screen = Screen(sys.stdout, sys.stderr, as_json=as_json)
    screen.result({"key": secret, "line": str(made)})
    screen.say(str(made))
    screen.note(f"the key of {name}, which is kept nowhere: {secret}")


@contextmanager
def _screen(as_json: bool) -> Iterator[Screen]:
    from deployments.cluster import quiet

    quiet()
    with own_screen(as_json=as_json) as screen:
        try:
            yield screen
        except TandemError as error:
            screen.result({"error": str(error)})
            raise


def main() -> None:
    """Runs the command, and ends the process with 0 for done, 1 for failed, 2 for wrong usage."""
    sys.exit(_run())


def _run() -> int:
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return WRONG_USAGE
    except TandemError as error:
        for line in (f"tandem: {error}", *getattr(error, "__notes__", ())):
            click.echo(line, err=True)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not break off the cleaning up at exit
        click.echo("tandem: stopped", err=True)
        return FAILED
    return DONE
