//! The linear modules of one layer of Llama-3-8B, with adapters of random factors.

use anyhow::{Context, Result, ensure};
use lora_core::lora::{LoraSite, SiteSpec, SlotLowRank, SlotSlice};
use lora_core::{Backend, DType, HostTensor, Pool, Tensor};
use lora_cuda::{Cuda, CudaLinear, CudaLoraPlan, CudaQueue};

/// Input and output widths of the sites: q/k/v, o, gate/up, down.
const SITES: [(usize, &[usize]); 4] =
    [(4096, &[4096, 1024, 1024]), (4096, &[4096]), (4096, &[14336, 14336]), (14336, &[4096])];

/// `scale` of every adapter.
const SCALE: f32 = 0.5;

/// Sum of the input and output widths of all modules.
pub fn widths() -> usize {
    SITES.iter().flat_map(|(k, parts)| parts.iter().map(move |n| k + n)).sum()
}

/// The four sites of one layer, with a weight and LoRA slots each.
pub struct Layer {
    sites: Vec<Site>,
}

struct Site {
    weight: CudaLinear,
    lora: LoraSite<Cuda>,
    adapters: Vec<Vec<SlotLowRank>>,
}

/// Inputs and outputs of a step, and the adapter of each row.
pub struct Batch {
    lora: CudaLoraPlan,
    slot_of_row: Vec<i32>,
    x: Vec<Tensor<Cuda>>,
    host_x: Vec<HostTensor>,
    out: Vec<Tensor<Cuda>>,
}

/// A bf16 matrix of uniform numbers with variance `1 / cols`: one random block, repeated.
pub fn random(rows: usize, cols: usize, seed: u64) -> Result<HostTensor> {
    const BLOCK: usize = (1 << 20) - 3;
    let limit = (3.0 / cols as f32).sqrt();
    let mut state = seed;
    let block: Vec<f32> = (0..BLOCK.min(rows * cols))
        .map(|_| {
            // Knuth's MMIX generator: a benchmark needs no better randomness.
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * limit
        })
        .collect();
    let block = HostTensor::from_f32(DType::Bf16, vec![block.len()], &block).context("a block")?;
    let bytes: Vec<u8> = block.bytes().iter().copied().cycle().take(2 * rows * cols).collect();
    HostTensor::new(DType::Bf16, vec![rows, cols], bytes).context("a matrix")
}

/// Batches of more rows than this are taken as prefill.
const MAX_DECODING: usize = 256;

impl Batch {
    /// `tokens` rows over `adapters` adapters: round-robin for decode, where each row is a sequence; in contiguous
    /// runs for prefill, where the rows of a prompt are neighbours.
    pub fn new(cuda: &Cuda, q: &mut CudaQueue, tokens: usize, adapters: usize) -> Result<Self> {
        let slot = |row: usize| {
            if tokens > MAX_DECODING { row * adapters / tokens } else { row % adapters }
        };
        let slot_of_row: Vec<i32> = (0..tokens).map(|row| slot(row) as i32).collect();
        let mut lora = cuda.lora_plan(tokens)?;
        cuda.plan_lora(q, &slot_of_row, &mut lora)?;
        let (mut x, mut host_x, mut out) = (Vec::new(), Vec::new(), Vec::new());
        let tensor = |cols| Tensor::zeros(cuda, Pool::Activations, tokens, cols, DType::Bf16);
        for (i, (k, parts)) in SITES.iter().enumerate() {
            let host = random(tokens, *k, 77 + i as u64)?;
            let mut input = tensor(*k)?;
            cuda.upload(q, host.bytes(), input.view_mut())?;
            x.push(input);
            host_x.push(host);
            out.push(tensor(parts.iter().sum())?);
        }
        Ok(Self { lora, slot_of_row, x, host_x, out })
    }
}

impl Layer {
    /// A layer without adapters.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        let site = |(i, (k, parts)): (usize, &(usize, &[usize]))| {
            let spec = SiteSpec::linear(*k, parts);
            let weight = random(spec.out_dim(), *k, i as u64)?;
            let weight = cuda.prepare_linear(&[weight], None)?;
            let table = cuda.lora_table(&spec, 0)?;
            Ok(Site { weight, lora: LoraSite { spec, table }, adapters: Vec::new() })
        };
        let sites = SITES.iter().enumerate().map(site).collect::<Result<_>>()?;
        Ok(Self { sites })
    }

    /// Replaces the adapters by `adapters` random ones of `rank`.
    pub fn load_adapters(
        &mut self,
        cuda: &Cuda,
        q: &mut CudaQueue,
        adapters: usize,
        rank: usize,
    ) -> Result<()> {
        for site in &mut self.sites {
            let spec = site.lora.spec.clone();
            site.lora.table = cuda.lora_table(&spec, adapters)?;
            site.adapters.clear();
            for slot in 0..adapters {
                let mut slices = Vec::new();
                for (i, columns) in spec.slices.iter().enumerate() {
                    let seed = (slot * 8 + i) as u64;
                    slices.push(SlotLowRank {
                        a: random(rank, spec.in_dim, seed)?,
                        b: random(columns.len(), rank, !seed)?,
                        scale: SCALE,
                    });
                }
                let filled = slices.iter().map(|low| {
                    Some(SlotSlice { low_rank: Some(low.clone()), ..SlotSlice::default() })
                });
                let filled: Vec<_> = filled.collect();
                cuda.write_slot(q, &mut site.lora, slot, &filled)?;
                site.adapters.push(slices);
            }
        }
        Ok(())
    }

    /// Runs every linear module of the layer.
    pub fn run(
        &self,
        cuda: &Cuda,
        q: &mut CudaQueue,
        batch: &mut Batch,
        with_adapters: bool,
    ) -> lora_core::Result<()> {
        for (i, site) in self.sites.iter().enumerate() {
            let lora = with_adapters.then_some((&site.lora, &batch.lora));
            let (x, out) = (batch.x[i].view(), batch.out[i].view_mut());
            cuda.linear_lora(q, x, &site.weight, lora, out)?;
        }
        Ok(())
    }

    /// Runs the layer without and with adapters, and compares sampled elements with the formula in f64.
    pub fn check(&self, cuda: &Cuda, q: &mut CudaQueue, batch: &mut Batch) -> Result<()> {
        let mut results = Vec::new();
        for with_adapters in [false, true] {
            self.run(cuda, q, batch, with_adapters)?;
            let of_sites = batch.out.iter().map(|out| download(cuda, q, out));
            results.push(of_sites.collect::<Result<Vec<_>>>()?);
        }
        for (i, site) in self.sites.iter().enumerate() {
            let (base, adapted) = (&results[0][i], &results[1][i]);
            let (mut error, mut size) = (0.0, 0.0);
            for sample in 0..64usize {
                let row = sample * 7919 % batch.slot_of_row.len();
                let n = sample * 104_729 % site.lora.spec.out_dim();
                let at = row * site.lora.spec.out_dim() + n;
                let expected = f64::from(base.get_f32(at)) + site.delta(batch, i, row, n);
                error += (f64::from(adapted.get_f32(at)) - expected).powi(2);
                size += expected.powi(2);
            }
            let relative = (error / size).sqrt();
            ensure!(relative < 1e-2, "site {i} is off by {relative}");
        }
        Ok(())
    }
}

impl Site {
    /// `scale * B (A x)` of output `n` in `row`.
    fn delta(&self, batch: &Batch, site: usize, row: usize, n: usize) -> f64 {
        let spec = &self.lora.spec;
        let slice = spec.slices.iter().position(|columns| columns.contains(&n)).unwrap_or(0);
        let low = &self.adapters[batch.slot_of_row[row] as usize][slice];
        let (rank, k) = (low.a.shape()[0], spec.in_dim);
        let n = n - spec.slices[slice].start;
        let z = |j: usize| -> f64 {
            let term = |c| {
                let x = batch.host_x[site].get_f32(row * k + c);
                f64::from(low.a.get_f32(j * k + c)) * f64::from(x)
            };
            (0..k).map(term).sum()
        };
        let sum: f64 = (0..rank).map(|j| z(j) * f64::from(low.b.get_f32(n * rank + j))).sum();
        sum * f64::from(low.scale)
    }
}

fn download(cuda: &Cuda, q: &mut CudaQueue, tensor: &Tensor<Cuda>) -> Result<HostTensor> {
    let layout = tensor.layout();
    let bytes = cuda.wait(cuda.download(q, tensor.view())?)?;
    HostTensor::new(layout.dtype, vec![layout.rows, layout.cols], bytes).context("an output")
}
