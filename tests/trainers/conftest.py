"""The models on disk that the tests here share."""

import pytest
import tiny


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """A tiny policy with its tokenizer, on disk."""
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory):
    """Another model, of another size, with a padded vocabulary."""
    return tiny.save_policy(tmp_path_factory.mktemp("teacher"), seed=1, hidden_size=48, vocab_size=64)
