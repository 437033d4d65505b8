"""Secrets by the names of their keys, in configurations, messages, command lines and every file that is written."""

from __future__ import annotations

import json
import os

import pytest

from dataflex.errors import ConfigError
from dataflex.printable import PASSED_ON, is_secret, passing_on, redacted, redacted_text, shown, without_secrets
from dataflex.record.recorder import RunRecorder

SECRET = """
hf_hub_token ms_hub_token om_hub_token hub_token token HF_TOKEN accessToken push_to_hub_token
swanlab_api_key wandb_api_key api_key apiKey WANDB_API_KEY endpoint.api_key password db_password
passwd secret client_secret secrets aws_secret_access_key ssh_private_key credentials headers
Authorization auth swanlab_lark_secret
""".split()
PLAIN = """
max_new_tokens max_tokens tokens num_tokens token_budget tokenizer tokenizer_name tokenized_path
use_fast_tokenizer last_token pad_token eos_token image_token new_special_tokens skip_special_tokens
split_special_tokens by_token key keys monkey api_key_env password_file author hub_model_id
hub_private_repo domain_column mixer weighter tokens_per_row dataset_dir resize_vocab target_tokens
""".split()


@pytest.mark.parametrize("key", SECRET)
def test_secrets(key):
    assert is_secret(key)
    assert redacted({"a": [{key: "s3cr3t"}]}) == {"a": [{key: "***"}]}
    assert "s3cr3t" not in redacted_text(f"override '{key}=s3cr3t and more': no")
    assert "s3cr3t" not in redacted_text(json.dumps({key: "s3cr3t"}))
    assert "s3cr3t" not in redacted_text(str({key: "s3cr3t"}))


@pytest.mark.parametrize("key", PLAIN)
def test_what_is_none(key):
    assert not is_secret(key)
    assert redacted({key: "value", "b": (1, None)}) == {key: "value", "b": (1, None)}
    assert redacted_text(f"{key}=value; '{key}': 'value'") == f"{key}=value; '{key}': 'value'"


def test_values_of_every_kind():
    given = {"password": 1234, "headers": {"X": "y", "n": [1, None]}, "use_auth_token": True, "hub_token": None}
    assert redacted(given) == {
        "password": "***",
        "headers": {"X": "***", "n": ["***", None]},
        "use_auth_token": True,
        "hub_token": None,
    }
    # A domain may be called so; its share tells nothing.
    assert redacted({"proportions": {"token": 0.25, "secret": 0.75}}) == {
        "proportions": {"token": 0.25, "secret": 0.75}
    }
    assert redacted({"url": "https://me:pw@host/x?api_key=zzz&n=1"}) == {"url": "https://me:***@host/x?api_key=***&n=1"}
    assert redacted_text("git+https://ghp_abc@host/x") == "git+https://***@host/x"
    assert redacted_text("Authorization: Bearer abcdefgh") == "Authorization: ***"
    assert redacted_text("sent Bearer abcdefgh") == "sent Bearer ***"
    assert redacted_text("hub_token: hf_abc\nseed: 1") == "hub_token: ***\nseed: 1"
    assert redacted_text("dynamic.weighter.token: unknown key") == "dynamic.weighter.token: unknown key"
    assert redacted_text("hub_token: must be text, found 5") == "hub_token: must be text, found 5"


def test_a_record_holds_no_secret(tmp_path):
    config = {"hf_hub_token": "s3cr3t", "dynamic": {"selector": {"reward": {"url": "http://u:s3cr3t@h"}}}, "seed": 1}
    RunRecorder(tmp_path).run_started(config=config, schedule={}, row_space={}, versions={}, world=1, global_batch=1)
    written = (tmp_path / "events.jsonl").read_text()
    assert "s3cr3t" not in written
    assert json.loads(written)["config"] == {
        "hf_hub_token": "***",
        "dynamic": {"selector": {"reward": {"url": "http://u:***@h"}}},
        "seed": 1,
    }


def test_files_of_runs_leave_secrets_out_and_processes_are_given_them(tmp_path, monkeypatch):
    mapping = {"hub_token": "s3cr3t", "seed": 1, "swanlab_api_key": None}
    assert without_secrets(mapping) == {"seed": 1, "swanlab_api_key": None}
    with passing_on(mapping):
        assert json.loads(os.environ[PASSED_ON]) == {"hub_token": "s3cr3t"}
        from dataflex.config.load import load_mapping

        (tmp_path / "run.yaml").write_text("seed: 1")
        assert load_mapping(tmp_path / "run.yaml") == {"hub_token": "s3cr3t", "seed": 1}
    assert PASSED_ON not in os.environ
    with pytest.raises(ConfigError, match="dynamic: holds a secret"):
        without_secrets({"dynamic": {"judge": {"api_key": "s3cr3t"}}})


def test_lines_that_are_shown():
    assert shown("kept \x1b[31mhub_token=s3cr3t") == r"kept \x1b[31mhub_token=***"
    assert shown("a\ud800\x85\u202eb\u6570\n\tc") == "a\\ud800\\x85\\u202eb\u6570\n\tc"
    stream = type("Stream", (), {"encoding": "ascii"})()
    assert shown("\u6570", stream) == "\\u6570"
