"""Of W&B's module what a run calls, with its parameters: each call is a line of $CALLS. Refuses when $REFUSE says so."""

import json
import os


class Error(Exception):
    pass


def note(what, *words, **named):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([what, words, named]) + "\n")
    if os.environ.get("REFUSE") == what:
        raise Error(f"{what} was refused\nin two lines")


class Settings:
    def __init__(self, **settings):
        self.settings = settings


class Run:
    offline = True
    url = None

    def log(self, data, step=None, commit=None):
        note("wandb.Run.log", data)

    def define_metric(self, name, step_metric=None):
        note("wandb.Run.define_metric", name, step_metric=step_metric)

    def finish(self, exit_code=None):
        note("wandb.Run.finish", exit_code=exit_code)


def init(project=None, dir=None, id=None, name=None, config=None, resume=None, settings=None):
    note(
        "wandb.init",
        project=project,
        dir=dir,
        id=id,
        name=name,
        config=config,
        resume=resume,
        settings=settings.settings,
    )
    return Run()
