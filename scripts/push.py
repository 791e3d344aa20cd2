"""Publish a run on the Hugging Face Hub: its adapter or full model, or a merged model, with a model card.

    python scripts/push.py --run runs/chartqa_qlora --repo_id me/qwen2-vl-chartqa --dry_run
    python scripts/push.py --run runs/chartqa_qlora --repo_id me/qwen2-vl-chartqa
    python scripts/push.py --run runs/chartqa_qlora --model merged --repo_id me/qwen2-vl-chartqa-merged --create_pr

A new repository is private unless --public is given. What is on the Hub is compared with what is here after the push; a
push that was interrupted is run again and sends what is missing. --help lists every option.
"""

import sys

from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.publishing.options import check_options, parse_options, run_push


@exits_with_user_errors
def main() -> None:
    """Read the command line, publish, print where it is."""
    quiet_libraries(rank=0)
    options = parse_options()
    check_options(options)
    try:
        print(run_push(options))
    except KeyboardInterrupt:
        print("interrupted; run the same command again: what has arrived is not sent twice", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
