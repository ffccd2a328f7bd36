import re

import pytest

from consistency.io.progress import ProgressBar, counting
from consistency.noise.curricula import FixedDecay
from consistency.training.averaging import TargetEMA
from consistency.training.progress_bar import TrainingProgress


@pytest.fixture
def log_file(monkeypatch):
    """Standard output is no terminal, whatever the surroundings say."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")


def steps_in(text):
    return [int(step) for step in re.findall(r"^step (\d+)/", text, re.MULTILINE)]


@pytest.mark.usefixtures("log_file")
def test_one_line_a_tenth(make_method, train, capsys):
    method = make_method(target_decay=FixedDecay(0.5))
    train(method, steps=20, callbacks=[TargetEMA(), TrainingProgress()])
    lines = capsys.readouterr().out.splitlines()
    assert steps_in("\n".join(lines)) == list(range(2, 21, 2))
    assert all(re.search(r"^step \d+/20  .*loss \S+  .*N=4\b", line) for line in lines)
    assert all("target_decay=0.5" in line for line in lines)
    assert all("images/s" in line for line in lines[1:])
    assert "\x1b" not in "".join(lines)


@pytest.mark.usefixtures("log_file")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fewer_steps_than_tenths(make_method, train, capsys, accumulate):
    train(make_method(), steps=3, accumulate=accumulate, callbacks=[TrainingProgress()])
    assert steps_in(capsys.readouterr().out) == [1, 2, 3]


@pytest.mark.usefixtures("log_file")
def test_resumed_run_goes_on_from_where_it_stands(make_method, train, capsys):
    method = make_method()
    method.progress.set_extra_state({"step": 14, "images_seen": 56})
    train(method, steps=20, callbacks=[TrainingProgress()])
    assert steps_in(capsys.readouterr().out) == [16, 18, 20]


@pytest.mark.usefixtures("terminal")
def test_live_bar(make_method, train, capsys):
    bar = TrainingProgress(refresh_seconds=0)
    train(make_method(), steps=4, callbacks=[bar])
    out = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "step 4/4" in out
    assert "N=4" in out
    assert "loss" in out
    assert steps_in(out) == []  # no plain lines beside it


@pytest.mark.usefixtures("terminal")
def test_terminal_is_given_back_after_an_exception(make_method, train, at, capsys):
    def fail(_):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        train(make_method(), callbacks=[TrainingProgress(), at(1, fail)])
    assert capsys.readouterr().out.count("\x1b[?25h") == 1  # the cursor is shown again


@pytest.mark.parametrize("surroundings", ["log_file", "terminal"])
def test_other_ranks_print_nothing(make_method, train, capsys, request, surroundings):
    request.getfixturevalue(surroundings)
    bar, method = TrainingProgress(), make_method()
    bar.disable()
    train(method, steps=4, callbacks=[bar])
    assert capsys.readouterr().out == ""
    assert method.progress.step == 4


@pytest.mark.usefixtures("log_file")
def test_enabled_again(make_method, train, capsys):
    bar = TrainingProgress()
    bar.disable()
    bar.enable()
    train(make_method(), steps=1, callbacks=[bar])
    assert steps_in(capsys.readouterr().out) == [1]


@pytest.mark.usefixtures("log_file")
def test_a_command_prints_no_line_for_what_is_done_at_once(capsys):
    with counting("sampling", 100) as advance:
        for _ in range(10):
            advance(10)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("log_file")
def test_lines_of_a_command_that_goes_on(capsys):
    bar = ProgressBar("sampling", 2000, 1000, line_seconds=0.0)
    for done in range(1000, 2001, 100):
        bar.advance(done, done)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"sampling {done:,}/2,000" for done in range(1200, 2001, 200)]
    assert all("images/s" in line and line.endswith(" left") for line in lines)


@pytest.mark.usefixtures("terminal")
def test_a_live_bar_of_a_command_is_gone_at_the_end(capsys):
    with counting("sampling", 4) as advance:
        advance(4)
    err = capsys.readouterr().err
    assert "sampling 4/4" in err
    assert err.endswith("\x1b[2K")  # the line is erased
