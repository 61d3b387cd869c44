"""The parts of `make demo` that need no server."""

import json

import pytest

from demo import run


def test_kept_ratios_are_differences_of_two_readings(capsys):
    run.show_kept({5: (10, 20)}, {5: (12, 24), 6: (4, 4)})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["5", "2", "/", "4", "0.50", "#" * 10] in lines
    assert ["6", "4", "/", "4", "1.00", "#" * 20] in lines
    assert ["all", "6", "/", "8", "0.75", "#" * 15] in lines


@pytest.mark.parametrize("after", [{}, {5: (3.0, 7.0)}])
def test_missing_counters_are_a_failure(after):
    with pytest.raises(run.DemoError, match="vllm:mod_kept_total"):
        run.show_kept({5: (3.0, 7.0)}, after)


def test_what_the_plugin_logged_is_shown(tmp_path, capsys):
    log = tmp_path / "log"
    log.write_text("INFO [engine.py:1] attn_sequence: 4 of 8 layers routed\nINFO [core.py:2] other\n")
    run.show_log(log, "attn_sequence")
    assert capsys.readouterr().out == "plugin: 4 of 8 layers routed\n"


def test_chat_templates_of_both_kinds_are_found(tmp_path):
    assert not run.has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    assert run.has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("x")
    assert run.has_chat_template(tmp_path)


def test_questions_come_from_the_rows_that_training_holds_out(tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(98)
    ]
    rows = [*chats, {"prompt": "plain", "completion": "a"}, {"text": "no question"}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    assert run.held_out_prompts(str(data)) == ["plain"]
    data.write_text("\n".join(map(json.dumps, chats)))
    assert run.held_out_prompts(str(data)) == ["q96", "q97"]
    data.write_text(json.dumps({"text": "no question"}))
    assert run.held_out_prompts(str(data)) == list(run.QUESTIONS)


def test_answers_are_shown_side_by_side(capsys):
    dense = run.Answers([run.Answer("Drink\n water.", 3, None)] * 3, 10.0)
    routed = run.Answers([run.Answer("Drink.", 2, 0.25)] * 3, 12.0)
    run.show_answers(dense, routed)
    said = capsys.readouterr().out
    assert said.count("dense:  Drink water.\n") == said.count("routed: Drink. (kept 0.25 of the routed layers)") == 3
