import pytest
import torch

from fedveil.attacks.inversion.lbfgs import Problems

COUNT, SIZE = 6, 12


def _bowls(points, which):
    """Losses of smooth, curved functions, a different one a problem; the last is flat."""
    torch.manual_seed(0)
    matrix = torch.randn(COUNT, SIZE, SIZE, dtype=torch.float64)
    matrix = matrix @ matrix.mT / SIZE + 0.3 * torch.eye(SIZE, dtype=torch.float64)
    matrix[-1] = 0
    aim = torch.randn(COUNT, SIZE, dtype=torch.float64)
    missed = torch.einsum("vij,vj->vi", matrix[which], points - aim[which])
    flat = (which == COUNT - 1).double()
    return missed.square().sum(dim=1) / 2 + 0.1 * (1 - flat) * points.cos().sum(dim=1)


def _evaluate(points, which):
    points = points.clone().requires_grad_()
    loss = _bowls(points, which)
    return loss.detach(), torch.autograd.grad(loss.sum(), points)[0]


def _alone(start, problem, history, inner, steps):
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([point], lr=1, max_iter=inner, history_size=history)

    def closure():
        optimiser.zero_grad()
        loss = _bowls(point[None], torch.tensor([problem]))[0]
        loss.backward()
        return loss

    path = []
    for _ in range(steps):
        optimiser.step(closure)
        path.append(point.detach().clone())
    return path


def _starts():
    torch.manual_seed(1)
    return torch.randn(COUNT, SIZE, dtype=torch.float64) * 2


@pytest.mark.parametrize(("history", "inner"), [(100, 20), (3, 4), (1, 5)])
def test_every_problem_takes_the_steps_of_pytorchs_lbfgs_on_it_alone(history, inner):
    problems = Problems.at(_starts(), _evaluate, history=history, inner=inner)
    paths = [_alone(start, i, history, inner, 4) for i, start in enumerate(_starts())]
    for step in range(4):
        problems.step(torch.arange(COUNT))
        expected = torch.stack([path[step] for path in paths])
        torch.testing.assert_close(problems.points, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(problems.loss, _bowls(expected, torch.arange(COUNT)))


def test_problems_left_out_stay_and_go_on_as_if_nothing_had_happened():
    problems = Problems.at(_starts(), _evaluate, history=5, inner=3)
    chosen = torch.tensor([0, 2, 4])
    problems.step(torch.arange(COUNT))
    held = problems.points.clone()
    problems.step(chosen)
    others = torch.tensor([1, 3, 5])
    assert torch.equal(problems.points[others], held[others])
    problems.step(others)
    problems.step(torch.arange(COUNT))
    together = Problems.at(_starts(), _evaluate, history=5, inner=3)
    for _ in range(3):
        together.step(torch.arange(COUNT))
    torch.testing.assert_close(problems.points, together.points)


def test_a_problem_that_is_flat_from_the_start_does_not_move():
    problems = Problems.at(_starts(), _evaluate, history=5, inner=3)
    problems.step(torch.arange(COUNT))
    assert torch.equal(problems.points[-1], _starts()[-1])
    assert not torch.equal(problems.points[0], _starts()[0])


def test_one_that_diverges_disturbs_no_other():
    def broken(points, which):
        loss, gradient = _evaluate(points, which)
        bad = which == 1
        return loss.masked_fill(bad, torch.nan), gradient.masked_fill(bad[:, None], torch.nan)

    problems = Problems.at(_starts(), broken, history=5, inner=6)
    whole = Problems.at(_starts(), _evaluate, history=5, inner=6)
    for _ in range(2):
        problems.step(torch.arange(COUNT))
        whole.step(torch.arange(COUNT))
    others = torch.tensor([0, 2, 3, 4, 5])
    torch.testing.assert_close(problems.points[others], whole.points[others])
