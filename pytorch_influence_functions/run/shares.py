"""What the processes of a run share: the solves of a group of test samples, and the gradients of the training set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..solve.errors import NegativeCurvatureError
from ..solve.groups import Earlier, Group, split
from ..solve.solvers import ONE_CURVATURE
from .distributed import Team
from .set_up import RunSetUp


def solutions(
    influence: InfluenceFunction,
    tests: Samples,
    indices: Sequence[int],
    earlier: Earlier,
    set_up: RunSetUp,
) -> Iterator[Group]:
    """The solutions of each group of test samples, of which each process solves a part."""
    if indices:
        influence.prepare(set_up)
    team = set_up.team
    for part in split(indices, influence.shared_group_size(team.size)):
        group = _solved(influence, tests, part, earlier, team)
        earlier = Earlier(earlier.total, influence.report)
        yield group


def _solved(
    influence: InfluenceFunction,
    tests: Samples,
    part: list[int],
    earlier: Earlier,
    team: Team,
) -> Group:
    mine = team.share(part)
    own = (
        next(influence.solutions(tests, mine, earlier), None) if mine else None
    )
    while not _of_one_curvature(influence, own is not None, earlier, team):
        own = (
            next(influence.solutions(tests, mine, earlier), None)
            if mine
            else None
        )
    return joined(part, own, influence, team)


def _of_one_curvature(
    influence: InfluenceFunction, solved: bool, earlier: Earlier, team: Team
) -> bool:
    """Whether all solved with one curvature; where one process had to leave the Hessian, the others do now.

    Raises:
        NegativeCurvatureError: earlier test samples were solved with the Hessian.
    """
    kind = influence.report.get("curvature") if solved else None
    kinds = {one for one in team.every(kind) if one is not None}
    if "ggn" in kinds and (kind or influence.problem.curvature.kind) != "ggn":
        influence.go_on(influence.problem.budget.total, "ggn")
    if len(kinds) < 2:
        return True
    if earlier.report:
        raise NegativeCurvatureError(ONE_CURVATURE)
    return False


def joined(
    part: list[int],
    own: Group | None,
    influence: InfluenceFunction,
    team: Team,
) -> Group:
    """The whole group, on every process; the first has a part of every group."""
    if team.size == 1 and own is not None:
        return own
    none = influence.objective.theta.new_zeros(0, influence.objective.P)
    r = team.told(
        None if own is None or own.chains is None else len(own.chains)
    )
    chains = None
    if r is not None:
        mine = none.expand(r, 0, -1) if own is None else own.chains
        chains = team.joined(mine, 1)  # type: ignore[arg-type]
    vectors = none if own is None else own.vectors
    residual = none[:, 0].cpu() if own is None else own.residual
    return Group(
        part, team.joined(vectors, 0), chains, team.joined(residual, 0)
    )


def scores(
    influence: InfluenceFunction, group: Group, team: Team
) -> tuple[Tensor, Tensor | None]:
    """Scores [k, n] of a group, and of each chain [r, k, n] or None; each process takes a part of the training set."""
    mine = team.share(range(influence.samples.n))
    mean, chains = influence.scores_of_group(group, mine)
    if chains is not None:
        chains = team.joined(chains, 2)
        return chains.mean(0), chains
    return team.joined(mean, 1), None


def gradient_rows(
    influence: InfluenceFunction, indices: Sequence[int], team: Team
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Loss gradients of training samples, a block at a time, of which each process computes a part."""
    if team.size == 1:
        yield from influence.gradient_rows(indices, text="grad_z")
        return
    size = team.size * influence.problem.gradient_batch
    for start in range(0, len(indices), size):
        block = indices[start : start + size]
        none = influence.objective.theta.new_zeros(0, influence.objective.P)
        parts = [rows for _, rows in influence.gradient_rows(team.share(block))]
        yield block, team.joined(parts[0] if parts else none, 0)
