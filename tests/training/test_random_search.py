"""Settings drawn from ranges."""

from bilevel.training.random_search import Among, Log, drawn_settings

SPACE = {"rate": Log(1e-3, 1e-1), "size": Among((16, 64, 256)), "mode": Among(("a", "b"))}


def test_draws_depend_on_the_key_and_the_number_alone() -> None:
    draws = [drawn_settings(SPACE, [seed, 7], trial) for seed in (0, 1) for trial in range(1, 20)]
    assert draws == [drawn_settings(SPACE, [seed, 7], trial) for seed in (0, 1) for trial in range(1, 20)]
    assert len({draw["rate"] for draw in draws}) > 30
    assert all(1e-3 <= draw["rate"] <= 1e-1 for draw in draws)
    assert sum(draw["rate"] < 1e-2 for draw in draws) in range(10, 29), "half of them, by the logarithm"


def test_each_value_comes_once_before_any_comes_again() -> None:
    sizes = [drawn_settings(SPACE, [3], trial)["size"] for trial in range(1, 10)]
    assert all(sorted(sizes[start : start + 3]) == [16, 64, 256] for start in (0, 3, 6))
    assert {tuple(sizes[start : start + 3]) for start in (0, 3, 6)} != {(16, 64, 256)}
