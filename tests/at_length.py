"""Tests that repeat at length, or with more variants, what shorter ones check too. CI has twenty minutes on two cores,
so `make test` leaves them out, and `make test-all` runs them as well."""

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
    "test_search_results::test_the_command_line_keeps_results_and_takes_them",
    "test_walk_resumed::test_two_methods_within_a_site_or_block_are_kept_apart",
    # Every operator under transformations: test_jax_modes traces all of them, and derives some.
    "test_matmul::test_vmap_over_x_and_scan_over_a_stack",
    "test_matmul::test_gradients_equal_those_through_dequantize",
    # Every shape and instruction set of a kernel; the other tests of each file have fewer.
    "test_cpu_kernel::test_identity_gives_the_weights_within_one_ulp",
    "test_byte_kernel::test_shapes_beyond_one_pass",
    "test_byte_kernel_by_row::test_rows_with_one_scale[",
    "test_native_refit::test_no_row_gets_worse_and_dtypes_stay",
    # Solvers against more references than one.
    "test_clustering::test_exact_is_no_worse_than_scikit_learn_on_200_rows",
    "test_clustering::test_chunks_order_and_powers_of_two_change_no_bit",
    "test_native_kmeans::test_exact_is_within_1e_6_of_a_float64_dynamic_program",
    "test_smoothquant::test_the_search_takes_what_has_the_least_error",
    "test_spqr::test_a_smaller_threshold_keeps_more_and_loses_less",
    # Benchmarks and examples beyond one of each kind.
    "test_bench::test_gemm_writes_every_product",
    "test_ablations::test_a_method_in_a_walk_is_measured",
    "test_examples::test_example[lora",
    "test_examples::test_example[orbax_roundtrip",
    "test_examples::test_example[swap_hf_llama",
)
"""The beginnings of their names, a file's name first."""
