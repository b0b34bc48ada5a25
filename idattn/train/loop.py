"""The run: data, steps, evaluations, checkpoints, and what is shown at the end."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from tqdm import tqdm

from idattn.chips import device_peak_flops
from idattn.choices import find_tracker
from idattn.config import Config, from_config_dict
from idattn.costs import count_parameters, training_flops_per_token
from idattn.data import count_epochs, digests, eval_batches, load_data, train_iterator
from idattn.evals.ngram import count_bytes, longest_copy, ngram_table
from idattn.evals.perplexity import mean_loss
from idattn.files import resolve_path
from idattn.inference import Decoder, generate_text
from idattn.sharding import local_rows, place
from idattn.train.checkpoint import Checkpoints, check_same_run, checkpoint_tokenizer, load_params, save_aside
from idattn.train.metrics import MetricsWriter, plot_losses, read_metrics
from idattn.train.step import State, Trainer
from idattn.train.stop import StopRequest
from idattn.train.storage import LocalFolder, exclusive
from idattn.train.trackers import Tracker


def train(
    config: Config | Mapping[str, Any],
    workdir: str | os.PathLike[str],
    *,
    init_from: str = "",
    profile: tuple[int, int] = (0, 0),
    trackers: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a language model, or resume the run that is in `workdir`; resumed runs are bit-exact.

    Writes to `workdir`: `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `loss.png`.

    A line of `metrics.jsonl` has the `step` and, every `train.log_every` steps, `loss` (nats per target, of the step's
    batch), `grad_norm`, `learning_rate`, `targets` (tokens of the batch that count in the loss), `not_finite` (such
    steps so far), `tokens` (that the run has trained on so far: steps x batch_size x seq_len), `epoch` (of each source)
    and, as means since the line before, `seconds_per_step`, `tokens_per_second` and `mfu` (share of the devices'
    published peak, where `idattn.chips` has it). The first step of every start, which compiles, and evaluations and
    saves are left out of these three. After an evaluation a line has `val_loss` and `val_perplexity`. Older versions
    wrote as `tokens` what is `targets` now.

    Args:
      config: the run, as a Config or as the ConfigDict of a config file.
      workdir: folder of the run; made if it does not exist. gs://BUCKET/FOLDER is in Google Cloud Storage.
      init_from: a checkpoint whose weights a new run starts from; its model and tokenizer must be the config's.
      profile: first and last step (from 1) of a window to profile into `workdir/profile`; (0, 0) for none.
        A run that is resumed within the window or after it is not profiled.
      trackers: where metrics go too: "wandb", or "module:Class" for a subclass of `idattn.train.Tracker`.

    A request to stop (SIGTERM, a preemption notice, Ctrl-C) takes effect after the step that is under way: all
    processes save the same step, and the call returns.

    Returns:
      `step`, `finished` (False after a request to stop), `val_loss` (nats per token), `best_val_loss`, `parameters`,
      and, where the config asks for them, `nats_per_byte` of the validation text, `ngram_losses` (of n-grams of its
      "bytes" and "tokens", in nats per byte by order), `sample` and `longest_copy`, the longest passage of the sample
      that the training text has too.

    Raises:
      ValueError: the config breaks a rule, does not fit the data or `init_from`, or `workdir` holds another run or one
        that is under way (not noticed in a bucket).
      FloatingPointError: the loss or gradient was not finite in more steps than the config skips; the state before the
        last of them is saved in `workdir`.
    """
    if not isinstance(config, Config):
        config = from_config_dict(config)
    run = _Run(config, resolve_path(workdir), init_from, profile, [find_tracker(name) for name in trackers])
    with exclusive(run.workdir):
        return run.run()


class _Run:
    def __init__(
        self,
        config: Config,
        workdir: epath.Path,
        init_from: str,
        profile: tuple[int, int],
        trackers: Sequence[type[Tracker]],
    ):
        self.config, self.workdir, self.profile, self.trackers = config, workdir, profile, trackers
        self.tokenizer, self.train_windows, self.val_windows = load_data(config.data)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size={config.model.vocab_size} must be at least the {self.tokenizer.vocab_size} tokens "
                f"of the tokenizer {config.data.tokenizer!r}."
            )
        if profile != (0, 0) and not 1 <= profile[0] <= profile[1] <= config.train.steps:
            raise ValueError(
                f"profile={profile} must be a first and a last step, in order, of the {config.train.steps} from 1."
            )
        self.trainer = Trainer(config)
        self.init_from = init_from
        self.rows = local_rows(self.trainer.mesh, config.train.batch_size)
        weights = config.data.weights
        self.data = train_iterator(self.train_windows, config.train.batch_size, config.seed, self.rows, weights)
        self.digests = digests(self.tokenizer, self.train_windows, self.val_windows)
        self.parameters = count_parameters(config.model)["total"]
        self.best = float("inf")
        self.val_loss = float("nan")
        self.skipped = 0  # steps that were not finite, as far as they were reported

    def run(self) -> dict[str, Any]:
        weights = None if (self.workdir / "config.json").exists() else self._initial_weights()
        check_same_run(self.workdir, self.config, self.digests)  # here: a start that fails leaves no config
        settings, mesh = self.config.train, self.trainer.mesh
        stored = Checkpoints(self.workdir, settings.keep_latest, settings.keep_best, self.tokenizer)
        with StopRequest() as self.stop, stored as saved:
            restored = saved.restore_latest(self.trainer.abstract_state(), self.data)
            if restored is None and weights is None:  # the run has a config, and was stopped before a checkpoint
                weights = self._initial_weights()
            start, state = restored or (0, self._initial_state(weights))
            del weights
            axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
            _print(
                f"{'+'.join(self.config.model.mixers)}: {self.parameters:,} parameters, {settings.steps:,} steps of "
                f"{settings.batch_size * self.config.data.seq_len:,} tokens on {mesh.size} x "
                f"{jax.local_devices()[0].device_kind}{f' ({axes})' if axes else ''}; "
                + (f"resumed {self.workdir} at step {start}" if restored else f"new run in {self.workdir}")
            )
            if stored_in := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
                _print(f"compiled programs are stored in {stored_in}")
            with MetricsWriter(self.workdir, start) if _is_main_process() else nullcontext() as self.writer:
                if self.writer:
                    history = read_metrics(self.workdir / "metrics.jsonl")
                    losses = (row.get("val_loss") for row in history)  # null where it was not finite
                    self.best = min((loss for loss in losses if loss is not None), default=self.best)
                    for tracker in self.trackers:
                        self.writer.trackers.append(tracker(self.config, self.workdir, start))
                done, state = self._steps(start, state, saved)
                if done == start == settings.steps:
                    self._evaluate(state)
        if done < settings.steps:
            _print(
                f"\nstopped by {self.stop.reason} with step {done} of {settings.steps} saved; the same command resumes."
            )
            return self._result(done)
        return self._report(state)

    def _initial_weights(self) -> Any:
        """The parameters of `init_from`, which must be of this run's model and tokenizer; None without it."""
        if not self.init_from:
            return None
        stored, params, step = load_params(self.init_from)
        theirs = checkpoint_tokenizer(self.init_from, stored)
        if theirs.fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                f"init_from={self.init_from!r} was trained with another tokenizer ({theirs.fingerprint[:12]}) than "
                f"this config's {self.config.data.tokenizer!r} ({self.tokenizer.fingerprint[:12]}): its weights are "
                f"of other pieces of text. Give this run the checkpoint's, --config.data.tokenizer={theirs.name}, and "
                "text or a folder that was prepared with it."
            )
        if stored.model != self.config.model:
            differing = dataclasses.replace(self.config, model=stored.model)
            raise ValueError(
                f"init_from={self.init_from!r} holds the weights of another model than this config's "
                f"({'; '.join(self.config.differences(differing))}). Give this run the same model."
            )
        _print(f"weights from {self.init_from}, step {step}")
        return params

    def _initial_state(self, weights: Any) -> State:
        state = self.trainer.init()
        if weights is None:
            return state
        return state | {
            "params": jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), weights, state["params"])
        }

    def _steps(self, start: int, state: State, checkpoints: Checkpoints) -> tuple[int, State]:
        settings = self.config.train
        pending = None  # metrics of the last step, recorded when the next one is under way
        self._clock: tuple[float, int] | None = None  # (time, step) since when speed is measured
        mesh, done = self.trainer.mesh, start
        hidden = start == settings.steps or not _is_main_process()
        with tqdm(
            total=settings.steps, initial=start, desc="compiling", unit="step", dynamic_ncols=True, disable=hidden
        ) as bar:
            while done < settings.steps and not self.stop.reached(done):
                done += 1
                if done == self.profile[0]:
                    traces = LocalFolder(self.workdir / "profile")
                    jax.profiler.start_trace(traces.path)
                batch = place(mesh, next(self.data), self.rows, settings.batch_size)
                with jax.transfer_guard("disallow"):
                    state, metrics = self.trainer.step(state, batch)
                bar.desc = ""  # the step is compiled
                self._record(pending, state, bar)
                pending = (done, metrics)
                evaluate = done % settings.eval_every == 0 or done == settings.steps
                save = done % settings.checkpoint_every == 0 or done == settings.steps
                if evaluate or save or done == self.profile[1]:
                    self._record(pending, state, bar)
                    pending = None
                    paused = time.perf_counter()
                    if done == self.profile[1] and start < self.profile[0]:
                        jax.profiler.stop_trace()
                        traces.close()
                    val_loss = None
                    if evaluate:
                        bar.set_description("evaluating")
                        val_loss = self._evaluate(state)
                        bar.desc = ""
                        with np.errstate(over="ignore"):  # infinity is right
                            self._write(done, {"val_loss": val_loss, "val_perplexity": np.exp(val_loss)})
                        _print(f"step {done:>7,}  validation loss {val_loss:.4f} nats per token")
                    self._upload_metrics()
                    if save:
                        checkpoints.save(done, state, self.data, self.config, val_loss)
                    assert self._clock is not None, "the step has been recorded"
                    self._clock = (self._clock[0] + time.perf_counter() - paused, self._clock[1])
                bar.update()
            if done < settings.steps:
                self._record(pending, state, bar)
                if checkpoints.latest_step() != done:
                    self._upload_metrics()
                    checkpoints.save(done, state, self.data, self.config)
        return done, state

    def _record(self, pending: tuple[int, dict[str, jax.Array]] | None, state: State, bar: tqdm) -> None:
        """Show and log the metrics of a step; stop the run if they are not finite."""
        if pending is None:
            return
        step, metrics = pending[0], {name: value.item() for name, value in jax.device_get(pending[1]).items()}
        skipped, allowed = metrics["not_finite"], self.config.train.skip_not_finite
        if skipped > allowed:
            name = f"not-finite-at-step-{step}"
            save_aside(self.workdir, name, state)
            raise FloatingPointError(
                f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; {allowed} such steps are "
                f"skipped (train.skip_not_finite). The state before it is in {self.workdir / name}. Try a lower "
                "learning rate, or look at the batch with this seed and step."
            )
        if skipped > self.skipped:
            self.skipped = skipped
            _print(
                f"step {step:>7,}  skipped: loss {metrics['loss']}, gradient norm {metrics['grad_norm']} "
                f"({skipped} of {allowed} that may be)"
            )
        now = time.perf_counter()
        then, earlier = self._clock = self._clock or (now, step)  # from the end of the first step, which compiles
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            self._clock = (now, step)
            batch_size, weights = self.config.train.batch_size, self.config.data.weights
            metrics |= count_epochs(self.train_windows, batch_size, step, weights)
            metrics["tokens"] = step * batch_size * self.config.data.seq_len
            shown = {"loss": f"{metrics['loss']:.3f}"}
            if step > earlier:
                metrics |= self._speed((now - then) / (step - earlier))
                mfu = f"{metrics['mfu']:.1%}" if "mfu" in metrics else "n/a"
                shown |= {"tokens_per_s": f"{metrics['tokens_per_second']:,.0f}", "mfu": mfu}
            bar.set_postfix(shown, refresh=False)
            self._write(step, metrics)

    def _speed(self, seconds_per_step: float) -> dict[str, float]:
        """The metrics of speed; `mfu` for devices whose peak is known."""
        T = self.config.data.seq_len
        speed = self.config.train.batch_size * T / seconds_per_step
        metrics = {"seconds_per_step": seconds_per_step, "tokens_per_second": speed}
        peak = device_peak_flops(jax.local_devices()[0].device_kind)
        if peak:
            flops = training_flops_per_token(self.config.model, T)
            metrics["mfu"] = speed * flops / (peak * self.trainer.mesh.size)
        return metrics

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self.writer:
            self.writer.write(step, metrics)

    def _upload_metrics(self) -> None:
        if self.writer:
            self.writer.upload()

    def _evaluate(self, state: State) -> float:
        settings = self.config.train
        batches = eval_batches(self.val_windows, settings.batch_size, settings.eval_batches, self.rows)
        placed = (place(self.trainer.mesh, batch, self.rows, settings.batch_size) for batch in batches)
        self.val_loss = mean_loss(self.trainer.loss, state["params"], placed)
        self.best = min(self.best, self.val_loss)
        return self.val_loss

    def _result(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "finished": step == self.config.train.steps,
            "val_loss": self.val_loss,
            "best_val_loss": self.best,
            "parameters": self.parameters,
        }

    def _report(self, state: State) -> dict[str, Any]:
        settings = self.config.train
        result = self._result(settings.steps)
        if not _is_main_process():
            return result
        held_out = ", ".join(self.config.data.holdout) or f"the validation documents of {self.config.data.source}"
        baselines, train_text = {}, ""
        if settings.ngram_orders and self.train_windows[0].is_text:
            parts = self.train_windows, self.val_windows
            train, validation = (np.concatenate([windows.stream[:] for windows in part]) for part in parts)
            size = count_bytes(validation, self.tokenizer)
            result["ngram_losses"] = ngram_table(train, validation, self.tokenizer, settings.ngram_orders, size)
            tokens_per_byte = np.count_nonzero(validation != self.tokenizer.bos_id) / size
            result["nats_per_byte"] = float(self.val_loss * tokens_per_byte)
            print(f"\nvalidation loss on {held_out}, nats per byte")
            print(f"  {'n-grams of order':<18}{''.join(f'{n:>7}' for n in range(1, settings.ngram_orders + 1))}")
            for name, losses in result["ngram_losses"].items():
                print(f"  {name:<18}{''.join(f'{loss:>7.3f}' for loss in losses)}")
                baselines[f"best n-gram of {name}"] = min(losses) / tokens_per_byte
            print(f"  {'this model':<18}{result['nats_per_byte']:>7.3f}  ({self.val_loss:.3f} per token)")
            train_text = self.tokenizer.decode(train)
        else:
            print(f"\nvalidation loss on {held_out}: {self.val_loss:.3f} nats per token")
        if settings.sample_prompt and jax.process_count() > 1:
            print("\nno sample, since the weights are spread over processes: see `idattn generate`")
        elif settings.sample_prompt:
            result["sample"] = self._sample(state)
            print(f"\nsample\n  {settings.sample_prompt}|{result['sample']}")
            if train_text:
                copy = result["longest_copy"] = longest_copy(result["sample"], train_text)
                print(f"\nits longest passage that the training text has too: {copy!r}")
        print(f"\nloss curves: {plot_losses(self.workdir, baselines)}\ncheckpoints: {self.workdir / 'checkpoints'}")
        return result

    def _sample(self, state: State) -> str:
        settings = self.config.train
        params = jax.device_put(state["params"], jax.local_devices()[0])
        decoder = Decoder(nnx.merge(self.trainer.graphdef, params))
        (completion,) = generate_text(
            decoder,
            self.tokenizer,
            [settings.sample_prompt],
            settings.sample_tokens,
            seed=self.config.seed % 2**31,  # of sampling, whose seeds are int32
            temperature=0.8,
        )
        return completion.text


def _is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def _print(text: str) -> None:
    if _is_main_process():
        tqdm.write(text)
