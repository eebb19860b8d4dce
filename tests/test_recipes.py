"""The rows against the table of the experiments, typed anew."""

from recipes import RECIPES, ROWS

KD, MSE = "kd", "mse"
TABLE = [
    # job, checkpoint, soft, alpha, T, beta, gamma, epochs, step, top-1, top-5, Test Loss
    ("teacher", "resnet50", None, 1.0, None, 0, 0, 100, 25, 69.87, 91.17, 0.00748289),
    ("student", "resnet18", None, 1.0, None, 0, 0, 50, 20, 59.22, 84.59, 0.00915756),
    ("distillation", "Distilled_resnet18", KD, 0.7, 2, 0, 0, 50, 20, 60.15, 85.35, 0.01049371),
    ("distillation_KMJ2", "Distilled_resnet18_KMJ2", KD, "per iteration", 2, 0, 0, 50, 20, 60.37, 85.53, 0.01071865),
    ("distillation_KMJ1", "Distilled_resnet18_KMJ1", KD, "per epoch", 2, 0, 0, 60, 20, 60.41, 85.50, 0.01063989),
    ("distillation_KMJ0", "Distilled_resnet18_KMJ0", KD, "per epoch", 2, 0, 0, 50, 20, 60.60, 85.57, 0.01058444),
    ("distillation_LDH", "Distilled_resnet18_LDH", KD, 0.7, 2, 0.5, 0, 50, 20, 63.46, 87.70, 0.00923391),
    ("distillation_LDH2", "Distilled_resnet18_LDH2", KD, 0.7, 2, 0, 0.2, 50, 20, 60.49, 85.33, 0.01046962),
    ("distillation_LDH3", "Distilled_resnet18_LDH3", KD, 0.7, 2, 0, 0.1, 50, 20, 60.65, 85.51, 0.01057834),
    ("distillation_LDH5", "Distilled_resnet18_LDH5", MSE, 0.7, None, 0, 0, 50, 20, 63.17, 87.52, 0.00746035),
    ("distillation_LDH6", "Distilled_resnet18_LDH6", MSE, "per epoch", None, 0, 0, 50, 20, 67.32, 89.10, 0.00675732),
    (
        "distillation_LDH9",
        "Distilled_resnet18_LDH9",
        MSE,
        "per iteration",
        None,
        0,
        0,
        50,
        20,
        65.92,
        89.11,
        0.00686661,
    ),
    (
        "distillation_LDH10",
        "Distilled_resnet18_LDH10",
        MSE,
        "first epoch, then per epoch",
        None,
        0,
        0,
        50,
        20,
        66.60,
        89.26,
        0.00683499,
    ),
]


def test_rows_are_those_of_the_table():
    rows = [
        (
            r.job,
            r.checkpoint,
            r.soft,
            r.alpha,
            r.settings.get("T"),
            r.beta,
            r.gamma,
            r.epochs,
            r.scheduler_step,
            *r.reference,
        )
        for r in ROWS
    ]
    assert rows == TABLE
    assert list(RECIPES) == [row[0] for row in TABLE]


def test_what_all_rows_share():
    assert {(row.learning_rate, row.batch_size) for row in ROWS} == {(0.001, 256)}


def test_networks():
    for row in ROWS:
        expected = "feature_student" if "LDH" in row.job else "teacher" if row.job == "teacher" else "student"
        assert row.network == expected
