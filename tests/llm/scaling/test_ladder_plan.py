"""The points of a ladder: that they spend their budgets, end their schedules, and name what is wrong."""

import json
from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.schedule import ScheduleConfig, learning_rate
from llm.scaling import table
from llm.scaling.config import load_ladder
from llm.scaling.plan import PlannedPoint, plan_ladder
from tests.runs import ROOT

EXPERIMENT = """
entry: llm.train
model: {kind: llama, layers: 2, heads: 2, width: 16, ffn: 32, qk_norm: true}
data: {sources: [{path: nowhere}], vocab_size: 300, block_length: 16}
train: {steps: 1, global_batch: 8, micro_batch: 2}
schedule: {kind: cosine, lr: 1.0e-2, final_lr: 0.0, warmup_steps: 0}
"""
LADDER = """
experiment: experiment.yaml
budgets: [{flops: 1e9}]
sizes: {s: {}, m: {model: {width: 32}}}
families:
  arm: {diffusion: {family: ar, objective: ar}}
  mdm: {diffusion: {family: mdm, objective: mdm}}
  prime: {diffusion: {family: prime, granularity: 3, objective: ce_joint}}
"""


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)
    (tmp_path / "ladder.yaml").write_text(LADDER)
    return tmp_path / "ladder.yaml"


def plan(ladder: Path, *overrides: str) -> dict[str, PlannedPoint]:
    return {one.point.name: one for one in plan_ladder(load_ladder(ladder, overrides))}


def test_the_flops_of_a_point_add_up_by_hand(ladder: Path) -> None:
    # A block: 4 d^2 of attention, 2 norms of a head's 8, 3 d f of feed-forward, 2 norms of d; and the last norm.
    parameters = 2 * (4 * 16**2 + 2 * 8 + 3 * 16 * 32 + 2 * 16) + 16
    per_token = 6 * (parameters + 300 * 16) + 12 * 2 * 16 * 16  # head; attention over 16 tokens in 2 layers
    steps = round(1e9 / (per_token * 8 * 16))
    one = plan(ladder)["prime/s-1e09-s0"]
    assert one.steps == one.experiment["train"]["steps"] == steps == 118
    assert one.point.parameters == parameters == 5232
    assert one.point.tokens == steps * 8 * 16
    assert one.point.flops == one.flops.full == per_token * one.point.tokens
    assert one.point.flops_6nd == 6 * parameters * one.point.tokens
    causal = plan(ladder)["arm/s-1e09-s0"]  # sees half of the tokens
    assert causal.flops.full / causal.point.tokens == per_token - 12 * 2 * 16 * 8


def test_every_rule_spends_its_budget_to_half_a_step(ladder: Path) -> None:
    for rule in ("full", "six_nd", "six_nd_label"):
        for one in plan(ladder, f"flops_rule={rule}").values():
            assert one.point.flops == getattr(one.flops, rule)
            assert abs(one.point.flops - 1e9) <= one.point.flops / one.steps / 2


def test_steps_grow_with_the_budget_and_shrink_with_the_batch(ladder: Path) -> None:
    points = plan(ladder, "budgets=[{flops: 1e9}, {flops: 8e9}, {flops: 1e10, global_batch: 16}]")
    one, eight, ten = (points[f"mdm/s-{budget}-s0"].steps for budget in ("1e09", "8e09", "1e10"))
    assert abs(eight - 8 * one) <= 5
    assert abs(ten - 5 * one) <= 3


def test_a_schedule_ends_at_the_last_step_of_its_own_point(ladder: Path) -> None:
    points = plan(ladder, "budgets=[{flops: 1e9}, {flops: 8e9}]", "rate.final_fraction=0.1", "rate.warmup_fraction=0.1")
    for one in points.values():
        schedule = ScheduleConfig(**one.experiment["schedule"])
        rates = [learning_rate(schedule, step, one.steps) for step in range(one.steps)]
        assert rates[-1] == pytest.approx(0.1 * schedule.lr)
        assert min(rates[schedule.warmup_steps : -1]) > rates[-1]
        assert schedule.warmup_steps == round(0.1 * one.steps)
        assert rates[schedule.warmup_steps - 1] == schedule.lr == pytest.approx(max(rates))


def test_learning_rates_follow_width_family_and_budget_unless_a_size_has_its_own(ladder: Path) -> None:
    rule = ["rate={lr: 0.01, at_width: 16, power: -1}", "families.mdm.rate_factor=2"]
    budgets = "budgets=[{flops: 1e9}, {flops: 2e9, rate_factor: 0.5}]"
    rates = {name: one.experiment["schedule"]["lr"] for name, one in plan(ladder, *rule, budgets).items()}
    assert rates["prime/s-1e09-s0"] == 0.01
    assert rates["prime/m-1e09-s0"] == 0.005
    assert rates["mdm/m-1e09-s0"] == 0.01
    assert rates["mdm/m-2e09-s0"] == 0.005
    own = plan(ladder, *rule, budgets, "sizes.m.lr=3e-3")
    assert own["prime/m-1e09-s0"].experiment["schedule"]["lr"] == 0.003


def test_budgets_families_and_the_ladder_choose_seeds_and_sizes_in_this_order(ladder: Path) -> None:
    names = list(
        plan(
            ladder,
            "seeds=[0, 1]",
            "budgets=[{flops: 2e9}, {flops: 1e9, seeds: [5], sizes: [m, s]}]",
            "families.mdm.seeds=[3]",
            "families.prime.sizes=[m]",
            "families.arm.budgets=[{flops: 3e9}]",
        )
    )
    assert names == [
        *("mdm/m-1e09-s5", "mdm/s-1e09-s5", "prime/m-1e09-s5"),
        *("prime/m-2e09-s0", "prime/m-2e09-s1", "mdm/s-2e09-s3", "mdm/m-2e09-s3"),
        *("arm/s-3e09-s0", "arm/m-3e09-s0", "arm/s-3e09-s1", "arm/m-3e09-s1"),
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("families.mdm.sizes=[sm]", r"families\.mdm\.sizes: unknown key 'sm'; did you mean 's'"),
        ("budgets=[{flops: 1e9, sizes: [l]}]", r"budgets\[0\]\.sizes: unknown key 'l'"),
        ("families.mdm.diffussion={family: ar}", "did you mean 'families.mdm.diffusion'"),
        ("sizes.s.model={widht: 16}", "point arm/s-1e09-s0: unknown key 'model.widht'"),
        ("families.mdm.diffusion.objective=nelbo_token+elbo", "unknown key 'elbo'"),
        ("budgets=[{flops: 1e9}, {flops: 1e9}]", "the point arm/s-1e09-s0 twice"),
        ("sizes={'a/b': {}}", "sizes.a/b: a name is part of a path"),
        ("families={}", "families is empty"),
        ("evaluation.sequences=1", "a standard error needs at least 2"),
        ("settings.evaluation.draws=3", r"settings\.evaluation\.draws is worked out .* use the section evaluation"),
        ("settings.schedule.warmup_steps=3", r"use rate\.warmup_fraction"),
        ("rate.warmup_fraction=2", r"rate.warmup_fraction = 2\.0"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_trained(ladder: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(ladder, override)


def test_files_are_found_from_the_file_that_names_them(ladder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "preset.yaml").write_text("model: {width: 64}\ntrain: {micro_batch: 4, steps: 9}\nrun: {seed: 7}\n")
    (elsewhere / "other.yaml").write_text("base: ../ladder.yaml\nsizes: {s: {preset: ../preset.yaml}}\n")
    one = plan(elsewhere / "other.yaml")["mdm/s-1e09-s0"]
    assert one.experiment["model"]["width"] == 64
    assert one.experiment["train"]["micro_batch"] == 4
    assert one.experiment["run"] == {"name": "mdm/s-1e09-s0", "seed": 0}


def test_settings_win_over_what_the_other_sections_say(ladder: Path) -> None:
    settings = "settings={model: {width: 48}, train: {log_every: 7, global_batch: 4}}"
    tree = plan(ladder, settings, "budgets=[{flops: 1e9, global_batch: 16}]")["mdm/m-1e09-s0"].experiment
    assert tree["model"]["width"] == 48
    assert (tree["train"]["log_every"], tree["train"]["global_batch"]) == (7, 4)


def test_the_hash_of_a_point_is_of_what_decides_its_result(ladder: Path) -> None:
    before = plan(ladder)["mdm/s-1e09-s0"].config_hash
    for free in ("settings.checkpoint.every=7", "settings.metrics.tensorboard=true", "jobs=3", "sizes.m.lr=1"):
        assert plan(ladder, free)["mdm/s-1e09-s0"].config_hash == before
    for bound in ("rate.lr=0.02", "evaluation.draws=3", "joint=false", "settings.optimizer.clip=2", "seeds=[1]"):
        assert next(p for n, p in plan(ladder, bound).items() if n.startswith("mdm/s")).config_hash != before


def test_warnings_name_points_that_repeat_data_and_points_of_few_steps(tiny, ladder: Path) -> None:
    data = f"settings.data={{sources: [{{path: {tiny.data}}}]}}"
    points = list(plan(ladder, data, "budgets=[{flops: 1e8}, {flops: 1e11}]").values())
    assert points[-1].epochs is not None and points[-1].epochs > 4
    repeated, short, thin = table.warnings(points)
    assert "6 points read the data more than 4 times" in repeated
    assert "6 points have fewer than 100 steps, arm/m-1e08-s0" in short
    assert "fewer than 3 sizes, so no IsoFLOP parabola: arm at 1e+08" in thin


def test_the_table_has_a_line_for_all_seeds_of_a_point_and_json_one_for_each(ladder: Path, capsys) -> None:
    assert table.main([str(ladder), "seeds=[0, 1]"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "prime/s-1e09" in line]
    assert len(lines) == 1 and "| 0,1 |" in lines[0].replace("   ", " ") and "118" in lines[0]
    assert table.main([str(ladder), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["totals"]["points"] == len(tree["points"]) == 6
    assert tree["totals"]["flops"] == sum(point["flops"] for point in tree["points"])


def test_measuring_gives_every_point_a_time(ladder: Path, capsys) -> None:
    assert table.main([str(ladder), "--measure", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert all(point["seconds"] > 0 for point in tree["points"])
    assert 0 < tree["totals"]["wall_seconds"] < sum(point["seconds"] for point in tree["points"])


def test_workers_take_the_points_in_order() -> None:
    assert table.wall_seconds([5.0, 1.0, 1.0, 1.0], jobs=2) == 5.0
    assert table.wall_seconds([1.0, 1.0, 1.0, 5.0], jobs=2) == 6.0


@pytest.mark.parametrize("name", ["paper_scale", "paper_slim", "study", "try"])
def test_the_ladders_of_the_repository_spend_their_budgets(name: str) -> None:
    ladder = load_ladder(ROOT / f"configs/llm/scaling/{name}.yaml")
    for one in plan_ladder(ladder):
        assert one.point.flops == pytest.approx(one.point.budget, rel=0.01), one.point.name


def test_the_published_grid_has_the_published_steps_where_a_run_ended_at_its_largest_budget() -> None:
    points = {p.point.name: p for p in plan_ladder(load_ladder(ROOT / "configs/llm/scaling/paper_scale.yaml"))}
    published = {
        "primev2/1107M-3e20-s1234": 87_500,
        "primev2/2359M-3e20-s1234": 21_000,
        "primev2/3426M-3e20-s1234": 14_000,
    }
    for name, steps in published.items():
        assert points[name].steps == pytest.approx(steps, rel=0.05)
        assert points[name].steps < steps
    assert len(points) == 199
    assert {p.point.size for p in points.values()} >= {"14M", "315M", "3426M"}
    assert points["arm/315M-1e20-s1234"].experiment["model"]["tied"]
    assert "tied" not in points["mdm/413M-1e20-s1234"].experiment["model"]
