"""Tests for which CI, with twenty minutes on two cores, has no time: most repeat at length, or with more variants, what
shorter ones check; some compare the quality of one method with another's. `make test` leaves them out, and
`make test-all` runs them as well: run it after a change in what they name."""

AT_LENGTH = (
    # Twenty kills, and interrupts at random moments; test_walk_resumed, test_partial, test_interrupt have chosen ones.
    "test_checkpoint_kill_quantize::test_a_run_that_is_killed_twenty_times_redoes_nothing",
    "test_interrupt::test_quantize_at_random_moments",
    "test_interrupt::test_generate_at_random_moments",
    # Mutated inputs: `make fuzz` goes through two thousand.
    "test_fuzz::test_mutated_inputs_give_a_result_or_one_sentence",
    "test_checkpoint_mutations::test_a_mutated_manifest_gives_a_model_or_one_sentence",
    # Each family from float to a checkpoint, where test_families and test_golden_checkpoints do so for some.
    "test_family_goldens::test_it_is_quantized_saved_loaded_and_generates",
    "test_family_goldens::test_cached_decoding_equals_the_whole_forward",
    "test_checkpoint_into::test_every_kind_computes_the_same_in_a_new_process",
    "test_jax_modes::test_a_model_is_quantized_saved_loaded_and_generates",
    "test_hf_flax::test_sampled_and_beam_tokens_equal_those_of_float_weights",
    "test_golden_checkpoints::test_a_hugging_face_model_gives_equal_tokens",
    "test_checkpoint_model::test_arrays_are_restored_onto_a_mesh",
    "test_checkpoint_into::test_one_device_to_two_and_back",
    "test_decode_loop::test_both_loops_give_the_same",
    "test_session::test_a_turn_reads_the_new_tokens_and_gives_what_the_whole_text_gives[dense",
    "test_kvquant::test_a_model_generates_with_it",
    "test_chat_cli::test_flags_of_sampling_are_the_arguments_of_generate",
    "test_hf_flax::test_every_family_runs_on_quantized_weights",
    "test_linen::test_scan_equals_a_loop_over_its_layers_in_value_and_in_gradients",
    "test_calibrate::test_a_deep_model_compiles_a_program_for_each_shape",
    "test_search_results::test_the_command_line_keeps_results_and_takes_them",
    "test_walk_resumed::test_two_methods_within_a_site_or_block_are_kept_apart",
    "test_walk_resumed::test_results_of_other_tokens_are_not_taken",
    "test_walk_resumed::test_statistics_in_hand_are_part_of_what_is_kept",
    "test_walk::test_statistics_of_pairs_compare_with_the_float_model",
    "test_gptq_walk::test_any_method_of_one_coded_matrix_may_be_inside",
    # Every operator under transformations: test_jax_modes traces all of them, and derives some.
    "test_matmul::test_vmap_over_x_and_scan_over_a_stack",
    "test_matmul::test_gradients_equal_those_through_dequantize",
    # Every shape and instruction set of a kernel; the other tests of each file have fewer.
    "test_cpu_kernel::test_identity_gives_the_weights_within_one_ulp",
    "test_byte_kernel::test_shapes_beyond_one_pass",
    "test_byte_kernel_by_row::test_rows_with_one_scale[",
    "test_native_compensation::test_codes_and_errors",
    "test_native_compensation::test_a_whole_matrix",
    "test_native_refit::test_no_row_gets_worse_and_dtypes_stay",
    # Solvers against more references than one.
    "test_clustering::test_exact_is_no_worse_than_scikit_learn_on_200_rows",
    "test_clustering::test_chunks_order_and_powers_of_two_change_no_bit",
    "test_native_kmeans::test_exact_is_within_1e_6_of_a_float64_dynamic_program",
    "test_clustering::test_results_are_consistent",
    "test_refit_hessian::test_no_round_raises_a_rows_error_in_stored_dtypes",
    "test_refit_hessian::test_a_rows_bits_depend_on_no_other_row",
    "test_clipping::test_a_clipped_range_lowers_the_weighted_error_of_every_group",
    "test_gptq::test_refits_lower_the_output_error",
    "test_awq::test_it_loses_less_than_the_inner_method_on_tokens_that_it_has_not_seen",
    "test_bcq::test_planes_offsets_rounds_and_weights_lower_the_error",
    "test_smoothquant::test_outliers_cost_less_once_they_are_smoothed",
    "test_smoothquant::test_the_search_takes_what_has_the_least_error",
    "test_spqr::test_a_smaller_threshold_keeps_more_and_loses_less",
    # Benchmarks and examples beyond one of each kind.
    "test_tour::test_it_runs",
    "test_bench_decode::test_decode_of_a_shape",
    "test_bench_decode::test_random_weights_have_the_form_that_their_method_gives",
    "test_bench::test_gemm_writes_every_product",
    "test_ablations::test_a_method_in_a_walk_is_measured",
    "test_examples::test_example[lora",
    "test_examples::test_example[orbax_roundtrip",
    "test_examples::test_example[swap_hf_llama",
)
"""The beginnings of their names, a file's name first."""
