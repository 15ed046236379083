"""`diffusion keys ...`: who may ask the endpoint."""

from typing import Annotated

import typer

from diffusion.serving.keys import Key, read
from diffusion.serving.keys import add as add_key
from diffusion.serving.keys import remove as remove_key
from diffusion.serving.priority import PRIORITIES
from flows.console import say, ticked, warn
from flows.foreground import guarded, looking
from flows.options import Debug, Home
from flows.site import Site

app = typer.Typer(
    help="API keys of the endpoint: where there is one, requests need one.", no_args_is_help=True, rich_markup_mode=None
)

KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; it stands in logs and metrics.")]


@app.command()
def add(
    name: KeyName,
    rate: Annotated[
        float | None, typer.Option("--rate", metavar="PER_MINUTE", help="Requests for pictures a minute. [any number]")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", metavar="N", help="Requests for pictures at once. [any number]")
    ] = None,
    priority: Annotated[
        str, typer.Option("--priority", metavar="|".join(PRIORITIES), help="Whose turn it is sooner.")
    ] = "normal",
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Make a key, and print it this once.  A running endpoint knows it at once."""

    def work(site: Site) -> None:
        secret = add_key(site.access.keys, name, rate, concurrency, priority)
        ticked(f"key {name}, which is shown this once and kept as a hash alone:")
        say(f"  {secret}")
        say("  Clients send it as `Authorization: Bearer KEY`, and so does OpenAI's with api_key=KEY.")

    guarded(work, debug, room=0, home=home)


@app.command("list")
def list_(home: Home = None, debug: Debug = False) -> None:
    """The keys there are: their names, when they were made, and what they may."""

    def work(site: Site) -> None:
        keys = read(site.access.keys)
        if not keys:
            say("  there is no key: the endpoint asks for none; `diffusion keys add NAME` makes one")
        for key in keys:
            say(f"  {key.name:<24} made {key.made}  {_may(key)}")

    looking(work, debug, home=home)


@app.command()
def remove(name: KeyName, home: Home = None, debug: Debug = False) -> None:
    """Forget a key: a running endpoint refuses it from the next request on."""

    def work(site: Site) -> None:
        left = remove_key(site.access.keys, name)
        ticked(f"the key {name} is not known any more")
        if not left:
            beyond = "one that listens beyond this machine lets nobody in"
            warn(f"it was the last: an endpoint on loopback asks for no key now, {beyond} (DIFFUSION_OPEN=true apart)")

    guarded(work, debug, room=0, home=home)


def _may(key: Key) -> str:
    rate = "any number of requests" if key.rate is None else f"{key.rate:g} requests a minute"
    atonce = "" if key.concurrency is None else f", {key.concurrency} at once"
    return rate + atonce + ("" if key.priority == "normal" else f", {key.priority} priority")
