"""ImageNet-2012 with each network's own paper's recipe, of all ResNets that of He et al. 2015.

    python experiments/train.py --config=configs/imagenet.py:resnet50 \
        --config.dataset.data_dir=data --workdir=runs/imagenet

The data set is as `tfds build imagenet2012 --file_format=array_record` prepares it (which needs
TensorFlow and the official archives), or with dataset.name=image_folder unpacked as
DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg. Pixels are normalised by ImageNet's mean colour and
deviation, not by its mean image. Where a paper lowers the rate when the validation error stands
still, the epochs are those of public code, as noted.
"""

from configs import default
from resvariants.networks import zoo

# fb.resnet.torch and what builds on it.
TORCH = {
    "optimizer.nesterov": True,
    "optimizer.weight_decay_parameters": "",
    "dataset.crop": "random_sized",
    "dataset.color_jitter": 0.4,
}
RECIPES = {
    # Xie et al. 2016, 4, and their code.
    "ResNeXt": {**TORCH, "schedule.length": 100, "schedule.milestones": (30, 60, 90)},
    "DenseNet": TORCH,  # Huang et al. 2017, 4.2
    # Simonyan & Zisserman 2014, 3.1: lowered three times within 74 epochs, when is not said.
    "VGG": {
        "dataset.shorter_side": (256, 512),
        "optimizer.weight_decay": 5e-4,
        "schedule.length": 74,
        "schedule.learning_rate": 0.01,
        "schedule.milestones": (20, 40, 60),
    },
    # Krizhevsky et al. 2012, 4.1, 5: lowered three times within about 90 epochs; when is Caffe's.
    "AlexNet": {
        "dataset.shorter_side": (256, 256),
        "batch_size": 128,
        "optimizer.weight_decay": 5e-4,
        "schedule.length": 90,
        "schedule.learning_rate": 0.01,
        "schedule.milestones": (20, 40, 60),
    },
    # Szegedy et al. 2014, 6: 4 % less every 8 epochs; the other numbers are Caffe's, jitter and
    # lighting fb.resnet.torch's. (The paper's steps are asynchronous, and it averages parameters
    # over them.)
    "GoogLeNet": {
        "dataset.crop": "random_sized",
        "dataset.color_jitter": 0.4,
        "batch_size": 32,
        "optimizer.weight_decay": 2e-4,
        "schedule.length": 250,
        "schedule.learning_rate": 0.01,
        "schedule.milestones": tuple(range(8, 250, 8)),
        "schedule.factor": 0.96,
    },
}


def get_config(model: str = "resnet50"):
    """Batch 256, rate 0.1 divided by 10 after epochs 30 and 60 of 90, but for `RECIPES`'
    families.

    That is He et al. 2016; He et al. 2015 lower the rate when the error stands still, within
    600,000 steps. Crops and colours are those of He et al. 2015, 3.4.
    """
    config = default.get_config()
    config.model.name = model
    config.dataset.name = "imagenet2012"
    config.dataset.flip = True
    config.dataset.crop = "scale_jitter"
    config.dataset.lighting = 0.1
    config.dataset.normalisation = "imagenet"
    # AlexNet's crops are larger than the others'; CIFAR's networks take any size.
    config.dataset.image_size = max(224, zoo.find(model).image_shape[0])
    config.batch_size = 256
    config.eval_batch_size = 256
    config.schedule.unit = "epochs"
    config.schedule.length = 90
    config.schedule.milestones = (30, 60)
    config.update_from_flattened_dict(RECIPES.get(zoo.find(model).family, {}))
    return config
