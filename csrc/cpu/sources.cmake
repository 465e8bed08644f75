# The sources of the CPU kernels, and the compiler options of each instruction set. A directory that
# compiles the kernels includes this file.
set(SIMPO_CPU_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/capability.cpp
    ${CMAKE_CURRENT_LIST_DIR}/pages.cpp
    ${CMAKE_CURRENT_LIST_DIR}/preference_loss.cpp
    ${CMAKE_CURRENT_LIST_DIR}/row_kernels_generic.cpp
    ${CMAKE_CURRENT_LIST_DIR}/sequence_logps.cpp
    ${CMAKE_CURRENT_LIST_DIR}/sequence_targets.cpp
    ${CMAKE_CURRENT_LIST_DIR}/token_logps.cpp
    ${CMAKE_CURRENT_LIST_DIR}/token_rows.cpp
    ${CMAKE_CURRENT_LIST_DIR}/vocab_shards.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  foreach(isa avx2 avx512 avx512_bf16)
    list(APPEND SIMPO_CPU_SOURCES ${CMAKE_CURRENT_LIST_DIR}/row_kernels_${isa}.cpp)
  endforeach()
endif()

# No contraction: a fused 1 - a * b would not be 0 where a * b rounds to 1. Products and sums that
# should be fused are written as fma.
set_source_files_properties(${SIMPO_CPU_SOURCES} PROPERTIES COMPILE_OPTIONS "-ffp-contract=off")

# Optimized in every configuration, because nearly all time is spent in these files. No kernel reads
# errno or the floating-point exception flags.
set(simpo_row_flags -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math)
set(simpo_avx2_flags -mavx2 -mfma -mf16c)
set(simpo_avx512_flags ${simpo_avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC warns about undefined vectors in its own intrinsics (GCC bug 105593).
  list(APPEND simpo_avx512_flags -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
set(simpo_flags_generic ${simpo_row_flags})
set(simpo_flags_avx2 ${simpo_row_flags} ${simpo_avx2_flags})
set(simpo_flags_avx512 ${simpo_row_flags} ${simpo_avx512_flags})
set(simpo_flags_avx512_bf16 ${simpo_row_flags} ${simpo_avx512_flags} -mavx512bf16)
foreach(isa generic avx2 avx512 avx512_bf16)
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/row_kernels_${isa}.cpp
                              PROPERTIES COMPILE_OPTIONS "${simpo_flags_${isa}}")
endforeach()
