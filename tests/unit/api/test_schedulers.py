"""The scheduler of a request: familiar names and options."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example
from hypothesis import given as given_any
from hypothesis import strategies as st

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.validation import validate
from calotype_server.engine.schedulers import names
from calotype_server.errors import InvalidRequest
from calotype_server.types import Job, SchedulerInfo, Sigmas, Speed, TimestepSpacing
from support.engine.fake_engine import MODEL
from support.service import LIMITS

DPM, EULER, ANCESTRAL = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
ALL_SIGMAS, ALL_SPACINGS = tuple(Sigmas), tuple(TimestepSpacing)
DETAILS = (
    SchedulerInfo("DDIMScheduler", ("DDIM",), (), ALL_SPACINGS),
    SchedulerInfo(
        DPM, ("DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE", "DPM++ 2M SDE Karras"), ALL_SIGMAS, ALL_SPACINGS
    ),
    SchedulerInfo(ANCESTRAL, ("Euler a",), (), ALL_SPACINGS),
    SchedulerInfo(EULER, ("Euler", "Euler Karras"), (Sigmas.KARRAS, Sigmas.EXPONENTIAL), ALL_SPACINGS[:2]),
)
DIFFUSION = replace(MODEL, schedulers=tuple(each.name for each in DETAILS), scheduler_details=DETAILS)
FLOW = replace(
    MODEL,
    scheduler="FlowMatchEulerDiscreteScheduler",
    schedulers=("FlowMatchEulerDiscreteScheduler",),
    scheduler_details=(SchedulerInfo("FlowMatchEulerDiscreteScheduler", ("Euler", "Euler a")),),
)


def job(model=DIFFUSION, **request) -> Job:
    """Returns the job of a request."""
    return validate(pb.GenerateRequest(prompt="a cat", **request), model, LIMITS)[0]


def violations(model=DIFFUSION, **request) -> list[tuple[str, str]]:
    """Returns fields and descriptions of the violations of a request."""
    with pytest.raises(InvalidRequest) as caught:
        job(model, **request)
    return [(each.field, each.description) for each in caught.value.violations]


@pytest.mark.parametrize(
    ("given", "scheduler", "sigmas"),
    [
        ("DPM++ 2M", "DPM++ 2M", None),
        ("dpm++ 2m karras", "DPM++ 2M", Sigmas.KARRAS),
        ("dpmpp_2m", "DPM++ 2M", None),
        ("dpmpp_2m_karras", "DPM++ 2M", Sigmas.KARRAS),
        ("dpmpp_2m_k", "DPM++ 2M", Sigmas.KARRAS),
        ("DPM++ 2M Exponential", "DPM++ 2M", Sigmas.EXPONENTIAL),
        ("dpmpp_2m_sde_gpu", "DPM++ 2M SDE", None),
        ("dpmpp_2m_sde_k", "DPM++ 2M SDE", Sigmas.KARRAS),
        ("Euler a", "Euler a", None),
        ("EULER A", "Euler a", None),
        ("euler_ancestral", "Euler a", None),
        ("euler_a", "Euler a", None),
        ("k_euler_a", "Euler a", None),
        ("euler_k", "Euler", Sigmas.KARRAS),
        ("ddim", "DDIM", None),
        (DPM, DPM, None),
    ],
)
def test_spellings_of_several_programs_are_the_same(given: str, scheduler: str, sigmas: Sigmas | None) -> None:
    """A name in any spelling gives the main spelling and its noise levels, so equal requests make equal jobs."""
    found = job(scheduler=given)
    assert (found.scheduler, found.sigmas, found.spacing) == (scheduler, sigmas, None)


@pytest.mark.parametrize(
    "spellings",
    [
        ("UniPC", "uni_pc", "unipc", "uni_pc_bh2"),
        ("DPM2", "dpm_2", "kdpm_2"),
        ("DPM2 a", "dpm_2_ancestral", "kdpm_2_a"),
        ("DPM++ 2S a", "dpmpp_2s_ancestral", "dpmpp_2s"),
        ("DPM++ 3M SDE", "dpmpp_3m_sde", "dpmpp_3m"),
        ("DPM++ SDE", "dpmpp_sde", "dpmpp_sde_gpu"),
        ("PLMS", "pndm"),
        ("SA-Solver", "sa_solver"),
        ("LMS Karras", "lms_k"),
        ("DPM++ 2S a Karras", "dpmpp_2s_ancestral_karras", "dpmpp_2s_k"),
        ("Euler SGM Uniform", "euler_sgm_uniform"),
    ],
)
def test_every_program_has_its_spellings(spellings: tuple[str, ...]) -> None:
    """Automatic1111's, ComfyUI's and InvokeAI's spellings of a name are the same name."""
    read = {names.read_name(spelling) for spelling in spellings}
    assert len(read) == 1
    assert None not in read


def test_every_alias_reads_as_itself() -> None:
    """The main spelling of each alias is read as that alias, also with a suffix, and no two are confused."""
    for alias in names.ALIASES:
        assert names.read_name(alias) == names.Name(alias)
        assert names.read_name(f"{alias} Karras") == names.Name(alias, Sigmas.KARRAS)


def test_options_reach_the_job() -> None:
    """Noise levels and spacing are part of the job, with a class name or an alias."""
    assert job(scheduler=EULER, sigmas=pb.SIGMAS_KARRAS).sigmas is Sigmas.KARRAS
    assert job(scheduler="Euler", sigmas=pb.SIGMAS_EXPONENTIAL).sigmas is Sigmas.EXPONENTIAL
    assert job(spacing=pb.TIMESTEP_SPACING_TRAILING).spacing is TimestepSpacing.TRAILING
    assert job(scheduler="Euler SGM Uniform").spacing is TimestepSpacing.TRAILING
    # The same choice twice is no contradiction.
    twice = job(scheduler="Euler Karras", sigmas=pb.SIGMAS_KARRAS, seed=1)
    assert twice == job(scheduler="euler_k", seed=1) == job(scheduler="Euler", sigmas=pb.SIGMAS_KARRAS, seed=1)


@pytest.mark.parametrize(
    ("request_fields", "expected"),
    [
        ({"scheduler": EULER, "sigmas": pb.SIGMAS_BETA}, ("sigmas", f"is BETA, and {EULER} does not support BETA")),
        ({"scheduler": "Euler a", "sigmas": pb.SIGMAS_KARRAS}, ("sigmas", "is KARRAS, and ")),
        ({"scheduler": "Euler a Karras"}, ("scheduler", "'Euler a Karras' is unavailable, because ")),
        (
            {"scheduler": "Euler Karras", "sigmas": pb.SIGMAS_EXPONENTIAL},
            ("sigmas", "is EXPONENTIAL, but scheduler 'Euler Karras' includes KARRAS"),
        ),
        ({"scheduler": EULER, "sigmas": 77}, ("sigmas", "has the unknown value 77")),
        ({"spacing": 77}, ("spacing", "has the unknown value 77")),
        (
            {"scheduler": "Euler Karras", "spacing": pb.TIMESTEP_SPACING_TRAILING},
            ("spacing", "is TRAILING, which cannot be combined with KARRAS sigmas"),
        ),
        (
            {"scheduler": "Euler Karras", "spacing": pb.TIMESTEP_SPACING_LINSPACE},
            ("spacing", f"is LINSPACE, and {EULER} does not support LINSPACE"),
        ),
        ({"scheduler": "DPM adaptive"}, ("scheduler", "'DPM adaptive' is unavailable, because DPM adaptive does not")),
        ({"scheduler": "res_multistep"}, ("scheduler", "'res_multistep' is unavailable, because ")),
        ({"scheduler": "Restart"}, ("scheduler", "'Restart' is unavailable, because ")),
        ({"scheduler": "er_sde"}, ("scheduler", "'er_sde' is unavailable, because ")),
        ({"scheduler": "UniPC"}, ("scheduler", "'UniPC' does not work with this model, must be one of DDIM")),
    ],
)
def test_unsupported_choices_are_violations(request_fields: dict, expected: tuple[str, str]) -> None:
    """Each choice that the model or the scheduler does not support is one violation that gives the reason."""
    ((field, description),) = violations(**request_fields)
    assert field == expected[0]
    assert description.startswith(expected[1])


@pytest.mark.parametrize(
    ("given", "meant"), [("Euler b", "Euler a"), ("DPM++ 2MM", "DPM++ 2M"), ("EulerScheduler", EULER)]
)
def test_an_unknown_name_gets_a_suggestion(given: str, meant: str) -> None:
    """An unknown name lists the class names and suggests the most similar name."""
    ((field, description),) = violations(scheduler=given)
    assert field == "scheduler"
    assert description.startswith(f"{given!r} is unknown, must be one of DDIMScheduler, ")
    assert description.endswith(f"did you mean {meant!r}?")


def test_nothing_is_suggested_without_similarity() -> None:
    """A name like no other gets no suggestion, and a long one is cut."""
    ((_, description),) = violations(scheduler="x" * 1000)
    assert "did you mean" not in description
    assert len(description) < 300


PIECES = st.sampled_from([*names.ALIASES, "Karras", "_k", "ancestral", "beta", "sgm_uniform", "dpmpp", " " * 9000, "K"])
NAMES = st.lists(PIECES | st.text(max_size=5), max_size=4).map("".join)


@example("Euler" + " " * 9000 + "Karras", pb.SIGMAS_EXPONENTIAL, 0)
@example("Euler a" + " " * 9000 + "Karras", 0, 0)
@given_any(NAMES, st.integers(0, 4), st.integers(0, 4))
def test_any_name_and_options_make_a_supported_job_or_short_violations(name: str, sigmas: int, spacing: int) -> None:
    """A job has a scheduler and options that the model offers; anything else is rejected, each field at most once."""
    try:
        found = job(scheduler=name, sigmas=sigmas, spacing=spacing)
    except InvalidRequest as error:
        fields = [each.field for each in error.violations]
        assert len(set(fields)) == len(fields)
        assert set(fields) <= {"scheduler", "sigmas", "spacing"}
        assert all(len(each.description) < 500 for each in error.violations)
    else:
        info = DIFFUSION.scheduler_info(found.scheduler)
        assert info is not None
        assert found.sigmas in (None, *info.sigmas)
        assert found.spacing in (None, *info.spacings)
        assert None in (found.sigmas, found.spacing)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a choice needs a package that is not installed, the violation says how to install it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    ((_, description),) = violations(scheduler="LMS Karras")
    assert description.endswith("needs the package scipy, which this server does not have: pip install scipy")
    ((_, description),) = violations(scheduler="DPMSolverSDEScheduler")
    assert description.endswith("pip install torchsde")
    ((field, description),) = violations(scheduler=EULER, sigmas=pb.SIGMAS_BETA)
    assert field == "sigmas"
    assert description.endswith("pip install scipy")
    # It would not help a flow model.
    ((_, description),) = violations(FLOW, scheduler="LMS")
    assert "pip" not in description


def test_limits_of_the_class_hold_for_its_aliases() -> None:
    """The maximum number of steps of a class is that of its aliases, and only smooth aliases can be fast."""
    model = replace(DIFFUSION, max_step_counts={DPM: 20}, fast_schedulers=(DPM, "DPM++ 2M"), step_count=40)
    assert job(model, scheduler="DPM++ 2M SDE").step_count == 20
    assert [field for field, _ in violations(model, scheduler="dpmpp_2m", step_count=21)] == ["step_count"]
    assert job(model, scheduler="DPM++ 2M Karras", speed=pb.SPEED_FAST, step_count=20).speed is Speed.FAST
    refused = violations(model, scheduler="DPM++ 2M SDE", speed=pb.SPEED_FAST, step_count=20)
    assert [field for field, _ in refused] == ["speed"]


def test_violations_are_in_the_order_of_the_fields() -> None:
    """An unknown scheduler hides no violation of another field."""
    found = violations(scheduler="no such thing", step_count=0, sigmas=99, spacing=99)
    assert [field for field, _ in found] == ["step_count", "scheduler", "sigmas", "spacing"]


def test_seed_minus_one_is_random() -> None:
    """The seed -1 is drawn like an absent one, so repeating such a request is not a conflict."""
    request = pb.GenerateRequest(prompt="a cat", seed=-1)
    (first, delivery), (second, _) = (validate(request, MODEL, LIMITS) for _ in range(2))
    assert delivery.seed_was_drawn
    assert first.seed >= 0
    assert first.seed != second.seed
