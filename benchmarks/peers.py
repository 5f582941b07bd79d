"""Other packages' ways to the same scores, each through its own public interface: (task, model, option) -> [K, n].

A score is positive where the training sample helps the test sample. `option` is the one number that decides most (the
damping where there is one); None leaves the package's default.
"""

import logging
import tempfile
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

BATCH = 100
logging.disable(logging.INFO)
warnings.simplefilter("ignore")


def loaders(task, batch=BATCH):
    return DataLoader(task.train, batch), DataLoader(task.test, batch)


def whole(task):
    """The training set and the test set in one batch each."""
    return DataLoader(task.train, task.n), DataLoader(task.test, len(task.test))


def given(**options):
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


# ---- kronfluence


def kronfluence_ekfac(task, model, damping):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch[0])
            labels = (
                torch.multinomial(logits.detach().softmax(-1), 1).flatten()
                if sample
                else batch[1]
            )
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    arguments = (
        ScoreArguments(
            damping_factor=None if damping == "heuristic" else damping
        )
        if damping
        else None
    )
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "digits", prepare_model(model, Classification()), Classification(), cpu=True, disable_tqdm=True,
            output_dir=folder,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "ekfac", task.train, BATCH, factor_args=FactorArguments()
        )
        analyzer.compute_pairwise_scores(
            "scores", "ekfac", query_dataset=task.test, train_dataset=task.train, per_device_query_batch_size=150,
            per_device_train_batch_size=BATCH, score_args=arguments,
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"]


# ---- captum


def captum_arnoldi(task, model, damping, **options):
    from captum.influence._core.arnoldi_influence_function import (
        ArnoldiInfluenceFunction,
    )

    with tempfile.NamedTemporaryFile() as file:
        torch.save(model.state_dict(), file.name)
        train, _ = loaders(task)
        influence = ArnoldiInfluenceFunction(
            model, train, file.name, checkpoints_load_func=load_state, loss_fn=nn.CrossEntropyLoss(reduction="none"),
            **given(hessian_reg=damping), **options,
        )  # fmt: skip
        return influence.influence(task.test.tensors)


def captum_arnoldi_wide(task, model, damping):
    """With a Krylov space and a projection that are as large as they may usefully be here."""
    return captum_arnoldi(
        task, model, damping, projection_dim=400, arnoldi_dim=500
    )


def load_state(model, path):
    model.load_state_dict(torch.load(path))
    return 1.0


# ---- dattri


def dattri_task(model):
    from dattri.task import AttributionTask

    def loss(parameters, batch):
        x, y = batch
        x, y = (x[None], y[None]) if x.ndim == 1 else (x, y)
        return F.cross_entropy(
            torch.func.functional_call(model, parameters, x), y.long()
        )

    return AttributionTask(
        loss_func=loss, model=model, checkpoints=model.state_dict()
    )


def dattri(attributor, task, **options):
    train, test = whole(task)
    attributor.cache(train)
    with torch.no_grad():
        return attributor.attribute(train, test, **options).T


def dattri_cg(task, model, damping):
    from dattri.algorithm.influence_function import IFAttributorCG

    return dattri(
        IFAttributorCG(dattri_task(model), **given(regularization=damping)),
        task,
    )


def dattri_explicit(task, model, damping):
    from dattri.algorithm.influence_function import IFAttributorExplicit

    return dattri(
        IFAttributorExplicit(
            dattri_task(model), **given(regularization=damping)
        ),
        task,
    )


def dattri_lissa(task, model, damping):
    from dattri.algorithm.influence_function import IFAttributorLiSSA

    return dattri(
        IFAttributorLiSSA(dattri_task(model), **given(damping=damping)), task
    )


def dattri_arnoldi(task, model, damping):
    from dattri.algorithm.influence_function import IFAttributorArnoldi

    return dattri(
        IFAttributorArnoldi(
            dattri_task(model), **given(regularization=damping)
        ),
        task,
    )


# ---- pyDVL


def pydvl(method, task, fit_batch=BATCH):
    train, test = loaders(task)
    method.fit(DataLoader(task.train, fit_batch))
    with torch.no_grad():
        factors = torch.cat(
            [method.influence_factors(*batch) for batch in test]
        )
    return torch.cat(
        [
            method.influences_from_factors(factors, *batch).detach()
            for batch in train
        ],
        1,
    )


def pydvl_direct(task, model, damping):
    from pydvl.influence.torch import DirectInfluence

    return pydvl(
        DirectInfluence(
            model, F.cross_entropy, **given(regularization=damping)
        ),
        task,
    )


def pydvl_direct_gauss_newton(task, model, damping):
    from pydvl.influence.torch import DirectInfluence
    from pydvl.influence.torch.util import SecondOrderMode

    options = {
        "second_order_mode": SecondOrderMode.GAUSS_NEWTON,
        **given(regularization=damping),
    }
    return pydvl(
        DirectInfluence(model, F.cross_entropy, **options), task, fit_batch=1
    )  # one gradient's square a batch


def pydvl_block_cg(task, model, damping):
    from pydvl.influence.torch import CgInfluence

    options = {"solve_simultaneously": True, "warn_on_max_iteration": False}
    return pydvl(
        CgInfluence(
            model, F.cross_entropy, **options, **given(regularization=damping)
        ),
        task,
    )


def pydvl_lissa(task, model, damping):
    from pydvl.influence.torch import LissaInfluence

    return pydvl(
        LissaInfluence(model, F.cross_entropy, **given(regularization=damping)),
        task,
    )


def pydvl_arnoldi(task, model, damping):
    from pydvl.influence.torch import ArnoldiInfluence

    return pydvl(
        ArnoldiInfluence(
            model, F.cross_entropy, **given(regularization=damping)
        ),
        task,
    )


def pydvl_ekfac(task, model, damping):
    from pydvl.influence.torch import EkfacInfluence

    return pydvl(
        EkfacInfluence(
            model, update_diagonal=True, **given(hessian_regularization=damping)
        ),
        task,
    )


def pydvl_nystroem(task, model, damping):
    from pydvl.influence.torch import NystroemSketchInfluence

    return pydvl(
        NystroemSketchInfluence(
            model, F.cross_entropy, 1e-3 if damping is None else damping, 500
        ),
        task,
    )


# ---- TRAK


def trak(task, model, damping):
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    size = sum(p.numel() for p in model.parameters())
    projector = BasicProjector(
        size,
        2048,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device="cpu",
        block_size=256,
    )
    train, test = loaders(task)
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model, "image_classification", task.n, save_dir=folder, device="cpu", projector=projector, proj_dim=2048,
            logging_level=logging.ERROR, use_half_precision=False, **given(lambda_reg=damping),
        )  # fmt: skip
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in train:
            traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        traker.start_scoring_checkpoint(
            "test", model.state_dict(), model_id=0, num_targets=len(task.test)
        )
        for batch in test:
            traker.score(batch, num_samples=len(batch[0]))
        return torch.tensor(traker.finalize_scores("test")).T


PEERS = {
    "kronfluence EKFAC": ("kronfluence", kronfluence_ekfac),
    "captum Arnoldi": ("captum", captum_arnoldi),
    "captum Arnoldi, wide": ("captum", captum_arnoldi_wide),
    "dattri explicit": ("dattri", dattri_explicit),
    "dattri CG": ("dattri", dattri_cg),
    "dattri LiSSA": ("dattri", dattri_lissa),
    "dattri Arnoldi": ("dattri", dattri_arnoldi),
    "pyDVL direct": ("pydvl", pydvl_direct),
    "pyDVL direct, Gauss-Newton": ("pydvl", pydvl_direct_gauss_newton),
    "pyDVL block CG": ("pydvl", pydvl_block_cg),
    "pyDVL LiSSA": ("pydvl", pydvl_lissa),
    "pyDVL Arnoldi": ("pydvl", pydvl_arnoldi),
    "pyDVL EKFAC": ("pydvl", pydvl_ekfac),
    "pyDVL Nyström": ("pydvl", pydvl_nystroem),
    "TRAK": ("trak", trak),
}
"""Name -> (the module that must be there, (task, model, option) -> scores [K, n])."""
