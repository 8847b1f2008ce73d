"""Plumbing: what the five scripts stand on. It knows none of them but loss.py and reward.py. In reading order:

    config       every setting, its default, its limits; files and command line
    run          one run: its folder, its start, its logs
    report       what it says of a step: numbers of the log, printed lines
    ranks        the process group, and the few collectives on Python objects
    watch        who waits for whom, and where each rank is
    policy       the trained model: packing, FSDP, scoring, one optimizer step
    broom        what branches share is forwarded once
    lora         adapters in place of the whole model
    weights      models in HF folders and on the hub
    engine       the two engines that sample: vLLM's, and a plain one to read
    memory       what fits on a GPU, and what a step costs
    checkpoint   written whole or not at all, checked when read
    files, card  small files; the model card
    track        a run's lines in wandb, trackio, tensorboard, mlflow
    data         questions, prompts, benchmarks
    pool         processes in which verifiers may hang or die
    method       a published method: its functions in place of the defaults
    sft          a cold start
    toy, countdown   the two tasks that come with it, and their base models
"""
