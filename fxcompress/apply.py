"""One pass over one graph that belongs to nobody else: look for sites, rewrite them, and again while it says so."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.calibration import collect
from fxcompress.editing import clean_up
from fxcompress.errors import FxCompressError, PassError, PreconditionError
from fxcompress.pass_base import Example, Pass, PassContext, Refusal, Site
from fxcompress.progress import Event, Progress
from fxcompress.report import PassRecord, RefusalRecord, SiteRecord
from fxcompress.reporting.sketch import target_of

__all__ = ["Applied", "apply_pass"]

# A round that changes something leaves fewer places of its kind, so there are never more rounds than nodes; the limit
# on top of that keeps a pass that never ends from taking a large graph's square of time.
_MOST_ROUNDS = 1000


@dataclasses.dataclass(frozen=True)
class Applied:
    """What a pass did: the places it rewrote in order, and what it refused when it last looked."""

    sites: tuple[SiteRecord, ...]
    refusals: tuple[RefusalRecord, ...]


def apply_pass(
    pass_: Pass,
    gm: fx.GraphModule,
    example: Example | None,
    batches: Iterable[Example] | None,
    tell: Progress,
    history: Sequence[PassRecord] = (),
) -> Applied:
    """Let ``pass_`` rewrite ``gm``, which is changed. A graph without sites stays exactly as it is.

    ``history`` is what passes did to it before.

    Raises:
        FxCompressError: the pass refuses the model.
        PassError: the pass failed, or finds new sites for ever; the message says at which node.
    """
    done: list[SiteRecord] = []
    rounds = min(len(gm.graph.nodes), _MOST_ROUNDS) + 1 if pass_.repeat else 1
    with torch.no_grad():
        for _ in range(rounds):
            sites, refusals = _look(pass_, gm, example, batches, tell, history)
            if sites:
                done += _rewrite(pass_, gm, sites, tell)
            if not (sites and pass_.repeat):
                return Applied(tuple(done), refusals)
    raise PassError(
        f"pass {pass_.name!r} still finds sites after {rounds} rounds, the last at {_place(sites[-1].node)}; "
        "its rewrite() must remove what its sites() looks for, or it must not set `repeat`. Your model is unchanged"
    )


def _look(
    pass_: Pass,
    gm: fx.GraphModule,
    example: Example | None,
    batches: Iterable[Example] | None,
    tell: Progress,
    history: Sequence[PassRecord],
) -> tuple[list[Site], tuple[RefusalRecord, ...]]:
    context = PassContext(gm, example, batches, history=history)
    with _blamed(pass_, "requires()"):
        pass_.requires(context)
    with _blamed(pass_, "observes()"):
        observations = tuple(pass_.observes(context))
    if observations:
        if batches is None:
            raise PreconditionError(
                f"pass {pass_.name!r} wants statistics of {_place(observations[0].node)} but there is no data; "
                "pass `calibration`"
            )
        statistics = collect(gm, batches, observations, lambda n, of: tell(Event("calibrate", pass_.name, n, of)))
        context = PassContext(gm, example, batches, statistics, history)
    tell(Event("sites", pass_.name))
    with _blamed(pass_, "sites()"):
        found = list(pass_.sites(context))
    sites: list[Site] = []
    refusals: dict[fx.Node, RefusalRecord] = {}
    for item in found:
        _check(pass_, gm, item)
        if isinstance(item, Site):
            sites.append(item)
        else:
            refusals.setdefault(item.node, RefusalRecord.of(item.node, item.reason))
    return sites, tuple(refusals.values())


def _check(pass_: Pass, gm: fx.GraphModule, item: object) -> None:
    if not isinstance(item, (Site, Refusal)):
        raise PassError(
            f"pass {pass_.name!r}: sites() must yield Site and Refusal objects, found {type(item).__name__}"
        )
    if item.node.graph is not gm.graph:
        raise PassError(
            f"pass {pass_.name!r}: sites() yielded {_place(item.node)} of another graph; take nodes from "
            "context.gm.graph and keep none from an earlier call"
        )


def _rewrite(pass_: Pass, gm: fx.GraphModule, sites: list[Site], tell: Progress) -> list[SiteRecord]:
    records = []
    for i, site in enumerate(sites):
        tell(Event("rewrite", pass_.name, i, len(sites)))
        record = SiteRecord.of(site.node, site.detail)
        try:
            said: Mapping[str, Any] = pass_.rewrite(site) or {}
        except Exception as error:
            raise PassError(
                f"pass {pass_.name!r} failed at {record.node!r} ({record.target!r}), site {i + 1} of {len(sites)}: "
                f"{type(error).__name__}: {error}. Your model is unchanged"
            ) from error
        records.append(dataclasses.replace(record, detail=SiteRecord.of(site.node, {**site.detail, **said}).detail))
    tell(Event("rewrite", pass_.name, len(sites), len(sites)))
    try:
        clean_up(gm)
    except Exception as error:
        raise PassError(
            f"pass {pass_.name!r} left a broken graph after rewriting {', '.join(r.node for r in records[:5])}"
            f"{' ...' if len(records) > 5 else ''}: {type(error).__name__}: {error}. Your model is unchanged"
        ) from error
    return records


@contextlib.contextmanager
def _blamed(pass_: Pass, method: str) -> Iterator[None]:
    """Name the pass in whatever ``method`` raises that is not a clear refusal already."""
    try:
        yield
    except FxCompressError:
        raise
    except Exception as error:
        raise PassError(
            f"pass {pass_.name!r} failed in {method}: {type(error).__name__}: {error}. Your model is unchanged"
        ) from error


def _place(node: fx.Node) -> str:
    return f"{node.name!r} ({target_of(node)!r})"
