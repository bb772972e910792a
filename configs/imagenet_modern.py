"""ImageNet-2012 by a recipe of today: "ResNet strikes back", A3 (Wightman et al. 2021, table 2).

    python experiments/train.py --config=configs/imagenet_modern.py:resnet50_v1_5 \
        --config.dataset.data_dir=data --workdir=runs/modern

Trained at 160 pixels and evaluated at 224. A batch of 2048 is the recipe's: where it does not fit,
`--config.accumulation_steps=8`. What timm does otherwise: images are resized and mapped by
bilinear or bicubic interpolation at random (here cropped by bicubic, mapped by bilinear), and the
cosine's period counts the warm-up.
"""

from configs import imagenet
from resvariants.networks import zoo


def get_config(model: str = "resnet50_v1_5"):
    """100 epochs of LAMB, each class against all others, mixup or CutMix, RandAugment."""
    config = imagenet.get_config(model)
    config.update_from_flattened_dict(
        {
            "dataset.image_size": 160,
            "dataset.eval_image_size": 224,
            "dataset.eval_crop": 0.95,
            "dataset.crop": "random_sized",
            "dataset.lighting": 0.0,
            "dataset.color_jitter": 0.0,
            "dataset.rand_augment": 2,
            "dataset.rand_augment_magnitude": 6.0,
            "dataset.rand_augment_deviation": 0.5,
            "dataset.mixup": 0.1,
            "dataset.cutmix": 1.0,
            "batch_size": 2048,
            "loss": "binary",
            # Both classes of a mixed image are there, whatever their shares (section 2.2), but for
            # small ones, as in the authors' runs by timm.
            "target_threshold": 0.2,
            "optimizer.name": "lamb",
            "optimizer.options": {"always_adapt": False},
            "optimizer.nesterov": False,
            "optimizer.weight_decay": 0.02,
            "optimizer.weight_decay_parameters": "kernel$",
            "optimizer.clip_norm": 1.0,
            "schedule.kind": "cosine",
            "schedule.length": 100,
            "schedule.milestones": (),
            "schedule.learning_rate": 8e-3,
            "schedule.warmup": 5,
            "schedule.warmup_kind": "linear",
            "schedule.warmup_learning_rate": 1e-4,
        }
    )
    if zoo.find(model).family in ("ResNet", "ResNeXt"):
        config.model.options = {"zero_init_residual": True}
    return config
