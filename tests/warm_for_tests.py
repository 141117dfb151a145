"""What the process that forks trainings imports, and reads, before the first one (see forks_for_tests.py)."""

import mlip_cli.commands.pretrain
import mlip_cli.commands.training  # noqa: F401
from mlip_cli.data.tokenizer import Tokenizer

Tokenizer(16).encode(["the vocabulary"])
