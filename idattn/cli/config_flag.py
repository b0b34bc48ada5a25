"""The flag --config=NAME_OR_FILE[:ARGUMENTS] of the programs, whose settings --config.SECTION.NAME=VALUE changes."""

import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from idattn.choices import check_choice
from idattn.config_files import config_names, load_config


class _Parser(flags.ArgumentParser):
    def parse(self, argument: str) -> ConfigDict:
        config = load_config(argument).lock()
        for path in (word.partition("=")[0][2:] for word in sys.argv if word.startswith("--config.")):
            section: Any = config
            for key in path.split(".")[1:]:
                check_choice(f"key of {path.removesuffix(f'.{key}')}", key, section)
                section = section[key]
        return config


def define_config() -> None:
    """Define the flag --config, which is required."""
    flags.disclaim_key_flags()  # they are the program's, for its --help
    text = f"The run: one of {', '.join(config_names())}, or a file; :ARGUMENTS are those of its get_config."
    config_flags.DEFINE_config_file("config", help_string=text)
    flags.FLAGS["config"].parser = _Parser()
    flags.mark_flag_as_required("config")
