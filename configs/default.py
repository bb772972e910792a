"""Every configuration key, once. Recipes start from here and state what they change.

None stands for "not set" where a key allows it.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """ResNet-20 on the embedded digits, with the optimiser of He et al. 2015."""
    config = ConfigDict()
    config.seed = 0  # initialisation, shuffling, augmentation, stochastic depth

    model = config.model = ConfigDict()
    model.name = "resnet20"  # python -m resvariants lists them
    model.dtype = "float32"  # of the computation: float32 or bfloat16; parameters stay float32
    # What the backward pass recomputes: none, block or sqrt; auto: block in long stages on CPUs.
    model.remat = "auto"
    # Units per iteration of the compiled loop; 0 is no loop, None no loop in stages of three units.
    model.unroll = placeholder(int)
    # Of DenseNet, VGG, AlexNet and GoogLeNet's main classifier; None is the network's own.
    model.dropout_rate = placeholder(float)
    model.survival_probability = 1.0  # of the last unit, in (0, 1]; below 1: stochastic depth
    model.survival_schedule = "linear"  # linear decay to it, or uniform
    model.frozen_norm = False  # leave BatchNorm's statistics, scales and biases as they are
    model.survival_draw = "batch"  # batch: for all its images; exact number; example: drop path

    dataset = config.dataset = ConfigDict()
    # digits, cifar10, cifar100, svhn, svhn_extra, mnist, fashion_mnist; and streamed from disk,
    # imagenet2012 as TFDS prepares it, and image_folder: data_dir/train/CLASS/*.jpg, data_dir/val
    dataset.name = "digits"
    dataset.data_dir = placeholder(str)  # where prepare.py wrote; None is TFDS's default
    dataset.validation_size = 0  # training images held out, chosen independently of the seed
    # per_pixel_mean or channel (of the training images), imagenet (its mean colour), or none
    dataset.normalisation = "per_pixel_mean"
    dataset.crop_padding = 0  # pad each side by so many zeros and crop at random; 0 is off
    dataset.flip = False  # mirror every other image, at random
    dataset.color_jitter = 0.0  # brightness, contrast, saturation times 1 ± up to this, at random
    dataset.lighting = 0.0  # standard deviation of noise along the principal colours
    dataset.image_size = 224  # the side of streamed images; the keys below are of them, too
    # random_sized: 8 to 100 % of the area; scale_jitter: a square, at a random shorter side
    dataset.crop = "random_sized"
    dataset.shorter_side = (256, 480)  # in pixels, of scale_jitter
    dataset.ten_crop = False  # evaluate corners, centre and mirror images, not the centre alone
    dataset.workers = 2  # processes that read and decode; 0 is threads of this one
    dataset.max_corrupt_images = 10  # so many images that cannot be read are skipped

    config.batch_size = 128  # of all devices together
    config.eval_batch_size = 512

    optimizer = config.optimizer = ConfigDict()
    optimizer.momentum = 0.9
    optimizer.nesterov = False
    optimizer.weight_decay = 1e-4
    optimizer.weight_decay_parameters = "kernel$"  # a regular expression on paths; "" is all
    optimizer.clip_norm = placeholder(float)  # largest global gradient norm; None is no clipping

    schedule = config.schedule = ConfigDict()
    schedule.kind = "piecewise"  # piecewise or cosine
    schedule.unit = "steps"  # of length, milestones and warmup: steps or epochs
    schedule.length = 64_000
    schedule.learning_rate = 0.1
    schedule.milestones = (32_000, 48_000)  # where the rate is multiplied by factor
    schedule.factor = 0.1
    schedule.warmup = 0
    schedule.warmup_learning_rate = 0.01
    schedule.warmup_kind = "constant"  # at warmup_learning_rate, or linear from it
    schedule.cut_to_steps = placeholder(int)  # shorten all of the above in proportion

    config.label_smoothing = 0.0
    config.auxiliary_weight = 0.3  # of the losses of auxiliary classifiers (GoogLeNet)

    config.parallel = "jit"  # jit over a mesh of all devices, or pmap (within one process)
    config.sync_batch_norm = True  # statistics of the global batch, or of each device's share

    # A folder of compiled programs for later runs to take; safe to delete. None is no such thing.
    # Not with several CPU devices: collectives in programs from a cache may wait for ever there.
    config.compilation_cache = placeholder(str)

    config.log_every_steps = 100
    config.eval_every_epochs = 1.0
    config.checkpoint_every_epochs = 1.0
    config.keep_checkpoints = 2
    config.tensorboard = False  # also write TensorBoard events (needs the tensorboard extra)
    return config
