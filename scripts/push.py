"""Publish a run on the Hugging Face Hub, with a model card made from its files.

    python scripts/push.py --run runs/chartqa_qlora \\
        --repo_id me/qwen2-vl-chartqa --dry_run
    python scripts/push.py --run runs/chartqa_qlora \\
        --repo_id me/qwen2-vl-chartqa
    python scripts/push.py --run runs/chartqa_qlora --model merged \\
        --repo_id me/qwen2-vl-chartqa-merged --create_pr

Publishes an adapter, a full model or a merged model. A new repository is
private unless --public is given. After the push, the files on the Hub are
compared with the local ones; run an interrupted push again to send the rest.
The token is that of `hf auth login` or HF_TOKEN; it is never printed or stored.
"""

import sys

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.publishing.options import PushOptions, check_options, run_push


@exits_with_user_errors
def main() -> None:
    """Read the command line, publish, print where it is."""
    quiet_libraries(rank=0)
    options = parse(PushOptions, usage=__doc__)
    check_options(options)
    try:
        print(run_push(options))
    except KeyboardInterrupt:
        print("interrupted; run the same command again: what has arrived is not sent twice", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
