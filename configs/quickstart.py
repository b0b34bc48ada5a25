"""A small interdomain model on the embedded Austen novels: the main job of `make quickstart`.

idattn train --config=quickstart --workdir=runs/quickstart
"""

from idattn.config import quickstart, to_config_dict


def get_config():
    return to_config_dict(quickstart())
