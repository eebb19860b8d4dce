"""test.py for the feature-distilled (LDH) rows.

Example: python test_LDH.py --model_job distillation_LDH6
"""

import cli
import test
from recipes import RECIPES

if __name__ == "__main__":
    cli.run(lambda: test.main(tuple(job for job, row in RECIPES.items() if row.network == "feature_student")))
