"""Tests that `make test-slow` runs instead of `make test`.

Each of these shows on another network, precision, layout or moment what a quicker test shows, or
takes programs of their own that start for seconds. By file: names, with parameters or without.
"""

LONG = {
    "analysis/test_deepen.py": """
        test_it_is_the_same_in_training_too[pre-activated ResNeXt, form a]
        test_it_is_the_same_in_training_too[post-activation bottlenecks]
        test_the_deeper_net_computes_the_same[ResNeXt, form a]
        test_the_deeper_net_computes_the_same[pre-activated bottlenecks]
        test_the_deeper_net_computes_the_same[post-activation bottlenecks]
        test_the_deeper_net_computes_the_same[pre-activated ResNeXt, form a]
        test_the_deeper_net_computes_the_same[ReLU-only pre-activation]
        test_the_deeper_net_computes_the_same[one-layer skips]
        test_new_blocks_learn[post-activation bottlenecks]
        test_new_blocks_learn[pre-activated bottlenecks]
        test_new_blocks_learn[ResNeXt, form a]
        test_new_blocks_learn[pre-activated ResNeXt, form a]
    """,
    "analysis/test_responses.py": """
        test_the_forms_of_resnext_have_the_same_responses_and_gradients
        test_so_it_is_in_every_family[preact_resnet50-50]
        test_so_it_is_in_every_family[preact_resnet200-200]
    """,
    "docs/test_docs.py": """
        test_snippets_run[dense_prediction]
        test_snippets_run[derivatives]
        test_snippets_run[your_own]
    """,
    "experiments/test_benchmark.py": """
        test_it_runs_where_there_is_little
        test_stock_flaxs_networks_are_ours[densenet121]
    """,
    "experiments/test_studies.py": """
        test_a_job_is_the_command_that_trains_the_same_config
        test_survival_probabilities_are_swept
        test_lesions_of_a_densenet_are_refused
        test_a_network_trained_on_short_paths_stands_beside_the_full_one
        test_programs_know_parts_of_ones_own_by_their_module
        test_responses_and_growth_report
        test_an_imported_network_is_studied_on_images_from_disk
    """,
    "networks/test_classic.py": """
        test_googlenet_equals_the_reference[True]
        test_execution_and_precision_are_options[model0]
    """,
    "networks/test_densenet.py": """
        test_what_is_kept_grows_linearly_if_asked_to_and_quadratically_if_not
    """,
    "networks/test_derivatives.py": """
        test_forward_over_reverse_is_reverse_over_reverse[DenseNet, memory efficient]
        test_forward_over_reverse_is_reverse_over_reverse[stochastic depth]
    """,
    "networks/test_every_model.py": """
        test_a_small_net_trains[densenet40_k12]
        test_a_small_net_trains[resnext29_8x64d]
        test_a_small_net_trains[cifar_vgg19_bn]
        test_a_small_net_trains[plain20]
        test_a_small_net_trains[preact_resnet1001]
        test_a_small_net_trains[resnet1202]
        test_a_small_net_trains[resnet110_exclusive_gating]
        test_a_small_net_trains[cifar_resnet152]
        test_a_small_net_trains[resnet110_shortcut_only_gating]
        test_a_small_net_trains[resnet110_dropout]
        test_a_small_net_trains[resnet110_relu_only_preactivation]
        test_a_small_net_trains[resnet110_relu_before_addition]
        test_a_small_net_trains[preact_resnet110]
        test_a_small_net_trains[resnet110_c]
        test_the_step_of_a_large_net_can_be_traced[densenet121]
        test_the_step_of_a_large_net_can_be_traced[googlenet_torchvision]
        test_the_step_of_a_large_net_can_be_traced[googlenet_bn]
    """,
    "networks/test_features.py": """
        test_dilated_stages_hold_the_strided_ones[8-paths side by side]
        test_dilated_stages_hold_the_strided_ones[8-stride in the 3x3]
        test_dilated_stages_hold_the_strided_ones[16-paths side by side]
        test_dilated_stages_hold_the_strided_ones[16-grouped]
    """,
    "networks/test_folding.py": """
        test_logits_are_those_of_whole_variables[resnext20_4x16d-options8-]
        test_logits_are_those_of_whole_variables[resnext20_4x16d-options9-]
        test_logits_are_those_of_whole_variables[resnet20_bottleneck-options3-]
    """,
    "networks/test_forms.py": """
        test_every_form_computes_the_same[pooling stem]
        test_every_form_computes_the_same[DenseNet]
        test_every_form_computes_the_same[slots]
    """,
    "networks/test_gates.py": """
        test_skipped_blocks_are_those_whose_residual_is_nothing[original-sqrt]
        test_skipped_blocks_are_those_whose_residual_is_nothing[projections everywhere-sqrt]
        test_skipped_blocks_are_those_whose_residual_is_nothing[pre-activation-sqrt]
        test_skipped_blocks_are_those_whose_residual_is_nothing[norm after addition-sqrt]
        test_skipped_blocks_are_those_whose_residual_is_nothing[scaled shortcut-sqrt]
        test_every_kind_of_block_can_be_dropped[resnext29_2x64d]
        test_every_kind_of_block_can_be_dropped[resnet1202]
    """,
    "networks/test_resnext.py": """
        test_the_forms_compute_the_same_function_and_gradients[a]
    """,
    "training/test_draws.py": """
        test_a_run_in_slots_resumes_to_the_same_bits
        test_steps_in_slots_are_those_with_conditionals[pre-activation]
    """,
    "training/test_ensembles.py": """
        test_a_scale_that_is_too_small_is_answered_with_the_smallest[vgg-16]
        test_an_ensemble_at_several_scales
        test_scales_are_averaged_over_whole_images_and_their_mirror_images[scales1]
    """,
    "training/test_faults.py": """
        test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits[during_an_evaluation]
        test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits[during_compilation]
        test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits[during_a_save]
        test_a_clock_that_jumps_changes_nothing
        test_a_signal_to_all_of_a_runs_processes_lets_it_save
        test_a_program_that_is_asked_to_stop_says_so_by_its_exit_status
    """,
    "training/test_loop.py": """
        test_stochastic_depth_trains_in_bfloat16_with_each_devices_statistics[jit]
        test_stochastic_depth_trains_in_bfloat16_with_each_devices_statistics[pmap]
        test_compiled_programs_are_taken_from_the_cache
        test_a_warmup_that_waits_for_the_error_is_told_and_resumed_to_the_same_bits
        test_tensorboard_shows_every_row_once_after_a_resume
        test_the_program_refuses_in_one_message[arguments2-invalid literal for int]
        test_the_program_refuses_in_one_message[arguments3-20 (n=3) or 26 (n=4)]
        test_the_program_refuses_in_one_message[arguments4-no such config file]
    """,
    "training/test_parallel.py": """
        test_devices_with_synchronised_statistics_agree_with_one_device[float32-constant depth]
        test_devices_agree_on_when_the_training_error_has_fallen
        test_statistics_of_each_devices_share_agree_between_modes_and_differ_from_global_ones
        test_a_memory_efficient_densenet_agrees_between_modes
    """,
    "training/test_statistics.py": """
        test_evaluation_with_them_gives_the_figures_of_a_run_that_had_them
        test_a_run_that_is_stopped_around_them_ends_with_the_same_bits
        test_streamed_images_count_at_their_centre_and_batches_with_a_damaged_one_do_not
    """,
    "weights/test_weights.py": """
        test_every_networks_stages_come_apart_and_together_again[pre-activation ResNet]
        test_every_networks_stages_come_apart_and_together_again[GoogLeNet]
        test_imported_weights_make_a_workdir_for_every_program
        test_every_networks_stages_come_apart_and_together_again[ResNeXt]
    """,
}
