"""The headline numbers of a report are those of one robot and of one task, before and after."""

from __future__ import annotations

from typing import Any

from cosmos3_train.commands.delivery import measured_numbers


def error(task: str, value: float) -> dict[str, Any]:
    return {"task": task, "error": value, "constant": 4.0}


def test_errors_of_two_tasks_are_not_compared():
    before = {"action": {"a": error("policy", 9.5)}, "inverse_dynamics": {"a": error("inverse_dynamics", 9.4)}}
    after = {"action": {"a": error("inverse_dynamics", 1.3)}, "policy": {"a": error("policy", 3.0)}}
    found = measured_numbers(before, after)
    assert found == {"action_error_after": 1.3, "action_error_constant": 4.0, "policy_error_after": 3.0}
    again = measured_numbers(after, after)
    assert again["action_error_before"] == 1.3 and again["policy_error_before"] == 3.0


def test_only_the_first_robot_has_the_plain_names():
    after = {
        "action": {"a": error("policy", 1.0), "b": error("inverse_dynamics", 2.0)},
        "policy": {"b": error("policy", 3.0)},
    }
    found = measured_numbers(None, after)
    assert found["action_error_after"] == 1.0 and found["action_error_after/b"] == 2.0
    assert found["policy_error_after/b"] == 3.0 and "policy_error_after" not in found
