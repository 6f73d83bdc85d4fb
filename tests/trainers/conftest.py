import pytest
import tiny


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """A tiny policy with its tokenizer, on disk."""
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))
