"""Rankings for chat models, which lmms-eval 0.7.3 refuses: its chat tasks generate only."""

from lmms_eval.api.task import ConfigurableTask


class RankingTask(ConfigurableTask):
    """
    A `multiple_choice` task whose requests have one form for all models: text, candidate, pictures.

    Args:
        config: of the task, as its YAML has it.
        kwargs: see the parent class.
    """

    def __init__(self, config: dict, **kwargs):
        super().__init__(config={key: value for key, value in config.items() if key != "class"}, **kwargs)
