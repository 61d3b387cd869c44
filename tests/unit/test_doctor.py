"""`vllm-mod doctor`: one line per question, and an exit status."""

import sys

import pytest

from vllm_mod import doctor, interfaces
from vllm_mod.architectures import Architecture
from vllm_mod.cli import main


@pytest.fixture(autouse=True)
def no_choice_of_plugins(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def answers(capsys) -> tuple[int, dict[str, tuple[str, str]]]:
    """(exit status, question -> (verdict, what is said))."""
    capsys.readouterr()
    status = main(["doctor"])
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    return status, {name: (verdict, said) for verdict, name, said in lines}


def test_a_sound_environment(capsys):
    import vllm

    status, found = answers(capsys)
    assert status == 0
    assert list(found) == ["plugin", "vLLM", "architectures", "interfaces"]
    assert found["plugin"][0] == "ok" and found["plugin"][1].startswith("entry point vllm_mod of vllm-mod ")
    assert found["vLLM"] == ("ok", f"{vllm.__version__} on cpu")
    assert found["architectures"][0] == "ok" and "LlamaForCausalLM" in found["architectures"][1]
    assert found["interfaces"][0] == "ok"


def test_a_plugin_that_vllm_does_not_find(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    status, found = answers(capsys)
    assert (status, found["plugin"][0]) == (1, "FAILED")
    assert "no entry point vllm_mod:register of vllm.general_plugins; pip install" in found["plugin"][1]
    assert found["vLLM"][0] == "ok"


@pytest.mark.parametrize(("names", "verdict"), [("other", "FAILED"), ("", "FAILED"), ("other,vllm_mod", "ok")])
def test_a_plugin_that_vllm_is_told_to_leave_out(capsys, monkeypatch, names, verdict):
    monkeypatch.setenv("VLLM_PLUGINS", names)
    assert answers(capsys)[1]["plugin"][0] == verdict


def test_an_untested_release_and_one_that_finds_no_device(capsys, monkeypatch):
    import vllm
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "device_type", "")
    status, found = answers(capsys)
    assert (status, found["vLLM"][0]) == (1, "FAILED")
    assert "finds no device" in found["vLLM"][1]
    monkeypatch.delenv("VLLM_MOD_ALLOW_UNTESTED", raising=False)  # set for a suite that runs on another release
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    status, found = answers(capsys)
    assert (status, found["vLLM"][0]) == (1, "FAILED")
    assert "0.99.0 is installed" in found["vLLM"][1]


def test_without_vllm(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    status, found = answers(capsys)
    assert status == 1
    assert found["vLLM"][0] == found["architectures"][0] == "FAILED"
    assert "vllm is not installed" in found["vLLM"][1]


def test_an_architecture_that_is_not_registered(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "ARCHITECTURES", {"OtherForCausalLM": Architecture("OtherForCausalLM")})
    status, found = answers(capsys)
    assert (status, found["architectures"]) == (1, ("FAILED", "not registered: OtherMoDForCausalLM"))


def test_an_interface_that_has_changed(capsys, monkeypatch):
    monkeypatch.setattr(interfaces, "INTERFACES", (interfaces.Interface("vllm.config", "VllmConfig", ("depths",)),))
    status, found = answers(capsys)
    assert (status, found["interfaces"]) == (1, ("FAILED", "vllm.config.VllmConfig lacks depths"))


def test_whatever_a_foreign_release_does(capsys, monkeypatch):
    monkeypatch.setattr(interfaces, "broken_interfaces", lambda experts=True: {}["no forward\nat all"])
    assert answers(capsys)[1]["interfaces"] == ("FAILED", "KeyError: 'no forward\\nat all'")
