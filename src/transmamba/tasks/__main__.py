"""lm-eval's own command line, with "transmamba" among its models:

python -m transmamba.tasks run --model transmamba --model_args pretrained=FOLDER,trans_points=0:64:none --tasks ...
"""

from transmamba.tasks.harness import harness_model


def main() -> None:
    """Register the model class, then let lm-eval read the arguments."""
    harness_model()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
