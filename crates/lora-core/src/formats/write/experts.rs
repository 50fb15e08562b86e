//! Writes routed experts in a layout of files, from one pair of stacks for each module.

use std::collections::BTreeMap;

use super::contents::{Contents, SiteUpdate, Target};
use super::fuse::{Member, Pair, fuse};
use super::names::{GATE_UP, Names};
use super::stack::{LazyTensor, Rows};
use super::{WriteError, inexpressible};
use crate::adapter::{Adapter, LowRank};
use crate::config::ExpertLayout;
use crate::ids::LayerIdx;
use crate::modules::{SiteKey, TargetModule};

/// The path of routed experts in every model that stores them as parameters.
const PARAMETERS: [&str; 2] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"];

/// Adds the tensors of all routed experts in the given layout.
///
/// # Errors
/// An adapter that the layout cannot represent.
pub(super) fn add(
    adapter: &Adapter,
    layout: ExpertLayout,
    names: &Names,
    contents: &mut Contents,
) -> Result<(), WriteError> {
    let layers = layers(adapter)?;
    if !layers.is_empty() {
        require_distinct(&layers, layout)?;
    }
    let mut writer = Writer { layout, names, contents };
    for layer in &layers {
        use ExpertLayout::*;
        match layout {
            PerExpert => writer.each(layer)?,
            Stacked | SharedOuter => writer.modules(layer),
            Fused | FusedInterleaved => writer.fused(layer)?,
            TargetParameters
            | TargetParametersSwapped
            | TargetParametersInterleaved
            | UnslothExpertSlowest => writer.parameters(layer)?,
        }
    }
    Ok(())
}

/// Routed experts of one layer.
struct Layer<'a> {
    number: u32,
    /// Number of experts; 1 if all matrices are shared, so that the adapter does not show it.
    experts: usize,
    modules: BTreeMap<TargetModule, &'a LowRank>,
}

/// The number of experts that a module has weights for; 1 if all of them share its matrices.
fn experts(low: &LowRank) -> usize {
    let extent = |shape: &[usize]| shape.first().copied().unwrap_or(1);
    extent(low.a.shape()).max(extent(low.b.shape()))
}

/// The layers with routed experts, in ascending order.
///
/// # Errors
/// Modules of one layer with different numbers of experts.
fn layers(adapter: &Adapter) -> Result<Vec<Layer<'_>>, WriteError> {
    let mut layers: BTreeMap<u32, BTreeMap<TargetModule, &LowRank>> = BTreeMap::new();
    let mut most = 1;
    for (key, low) in adapter.low_ranks() {
        if let SiteKey::Layer(layer, module) = key
            && module.is_routed_expert()
        {
            layers.entry(layer.0).or_default().insert(module, low);
            most = most.max(experts(low));
        }
    }
    let mut all = Vec::new();
    for (number, modules) in layers {
        let own = modules.values().map(|low| experts(low)).max().unwrap_or(1);
        let count = if own == 1 { most } else { own };
        for (module, low) in &modules {
            if ![1, count].contains(&experts(low)) {
                return Err(inexpressible(
                    &SiteKey::Layer(LayerIdx(number), *module),
                    format!("{} experts", experts(low)),
                    format!("{count} experts, as other modules of the layer have"),
                    "read the adapter for its model, with allow_missing_experts: true",
                ));
            }
        }
        all.push(Layer { number, experts: count, modules });
    }
    Ok(all)
}

/// Refuses a file that would be detected as [`ExpertLayout::Stacked`], as nothing in it is specific to the
/// requested layout.
fn require_distinct(layers: &[Layer<'_>], layout: ExpertLayout) -> Result<(), WriteError> {
    let mut modules = layers.iter().flat_map(|layer| &layer.modules);
    let (found, allowed) = match layout {
        ExpertLayout::SharedOuter => {
            let shared = |low: &LowRank| low.a.shape().first() != low.b.shape().first();
            if modules.any(|(_, low)| shared(low)) {
                return Ok(());
            }
            ("no matrix that all experts share", "a module of which all experts share A or B")
        }
        ExpertLayout::Fused | ExpertLayout::FusedInterleaved => {
            if modules.any(|(module, _)| *module != TargetModule::Moe4hToH) {
                return Ok(());
            }
            ("neither gate nor up", "a module to be fused")
        }
        _ => return Ok(()),
    };
    let remedy = format!("choose the layout {}", ExpertLayout::Stacked);
    Err(inexpressible("routed experts", found, allowed, remedy))
}

struct Writer<'a> {
    layout: ExpertLayout,
    names: &'a Names,
    contents: &'a mut Contents,
}

impl Writer<'_> {
    /// Writes a pair of matrices for each expert.
    fn each(&mut self, layer: &Layer<'_>) -> Result<(), WriteError> {
        if layer.experts == 1 {
            return Err(inexpressible(
                &format!("layer {} {}", layer.number, self.names.block()),
                "weights of one expert, which all experts share",
                "weights for each of several experts",
                format!("choose the layout {}", ExpertLayout::Stacked),
            ));
        }
        for (module, low) in &layer.modules {
            let Pair { rank, scale, a, b } = Pair::of(low).for_experts(layer.experts);
            let ([_, _, input], [_, output, _]) = (a.extents(), b.extents());
            let (block, name) = (self.names.block(), self.names.expert(*module));
            for expert in 0..layer.experts {
                let path = format!("{block}.{expert}.{name}");
                let matrices =
                    [a.expert(expert).dense([rank, input]), b.expert(expert).dense([output, rank])];
                self.contents.add_pair(&self.names.in_layer(layer.number, &path), matrices);
                self.contents.targets.push(Target { layer: Some(layer.number), path });
            }
            let block = self.names.in_layer(layer.number, block);
            let [block, name] = [&block, name].map(fancy_regex::escape);
            let key = format!(r"{block}\.\d+\.{name}");
            self.contents.updates.push(SiteUpdate { key, rank, scale });
        }
        Ok(())
    }

    /// Writes a pair of stacks for each module; a shared matrix is stored once if the layout allows it.
    fn modules(&mut self, layer: &Layer<'_>) {
        for (module, low) in &layer.modules {
            let path = format!("{}.{}", self.names.block(), self.names.expert(*module));
            let pair = Pair::of(low);
            // If both matrices are shared, B is still written for each expert, as the file must show their
            // number.
            let pair = match self.layout {
                ExpertLayout::SharedOuter if experts(low) > 1 => pair,
                ExpertLayout::SharedOuter => Pair { b: pair.b.for_experts(layer.experts), ..pair },
                _ => pair.for_experts(layer.experts),
            };
            self.stacks(layer.number, path, pair);
        }
    }

    /// Writes gate and up as one pair of stacks.
    fn fused(&mut self, layer: &Layer<'_>) -> Result<(), WriteError> {
        let interleaved = self.layout == ExpertLayout::FusedInterleaved;
        if let Some(pair) = gate_and_up(layer, interleaved)? {
            self.stacks(layer.number, format!("{}.{GATE_UP}", self.names.block()), pair);
        }
        if let Some(low) = layer.modules.get(&TargetModule::Moe4hToH) {
            let pair = Pair::of(low).for_experts(layer.experts);
            let name = self.names.expert(TargetModule::Moe4hToH);
            self.stacks(layer.number, format!("{}.{name}", self.names.block()), pair);
        }
        Ok(())
    }

    fn stacks(&mut self, layer: u32, path: String, pair: Pair) {
        let (a, b) = (pair.a.extents(), pair.b.extents());
        let module = self.names.in_layer(layer, &path);
        self.contents.add_pair(&module, [pair.a.dense(a), pair.b.dense(b)]);
        let key = fancy_regex::escape(&module).into_owned();
        self.contents.updates.push(SiteUpdate { key, rank: pair.rank, scale: pair.scale });
        self.contents.targets.push(Target { layer: Some(layer), path });
    }

    /// Writes PEFT's `target_parameters`: the experts of a parameter, flattened into one pair of matrices.
    fn parameters(&mut self, layer: &Layer<'_>) -> Result<(), WriteError> {
        let interleaved = self.layout == ExpertLayout::TargetParametersInterleaved;
        let down = layer.modules.get(&TargetModule::Moe4hToH);
        let down = down.map(|low| Pair::of(low).for_experts(layer.experts));
        let pairs = [gate_and_up(layer, interleaved)?, down];
        let both = pairs.iter().all(Option::is_some);
        for (parameter, pair) in PARAMETERS.into_iter().zip(pairs) {
            let Some(pair) = pair else { continue };
            // PEFT wraps the module once for each parameter; the first wrapper is inside of the second.
            let wrapped = both && parameter == PARAMETERS[0];
            let path = if wrapped { "mlp.experts.base_layer" } else { "mlp.experts" };
            let key = self.names.in_layer(layer.number, parameter);
            let key = fancy_regex::escape(&key).into_owned();
            self.contents.updates.push(SiteUpdate { key, rank: pair.rank, scale: pair.scale });
            self.contents.parameters.push((layer.number, parameter));
            let module = self.names.in_layer(layer.number, path);
            self.contents.add_pair(&module, flatten(pair, self.layout));
        }
        Ok(())
    }
}

/// Gate and up of a layer as one update, with rows concatenated or interleaved; zeros for an absent one.
fn gate_and_up(layer: &Layer<'_>, interleaved: bool) -> Result<Option<Pair>, WriteError> {
    let sides = [TargetModule::MoeHTo4h, TargetModule::MoeGate];
    let rows = |low: &&LowRank| low.b.shape().get(1).copied().unwrap_or(0);
    let low = |module: TargetModule| layer.modules.get(&module).copied();
    let widths = sides.map(|module| low(module).as_ref().map(rows));
    let width = match widths {
        [Some(gate), Some(up)] if gate != up => {
            return Err(inexpressible(
                &format!("layer {} {} and {}", layer.number, sides[0], sides[1]),
                format!("{gate} rows beside {up}"),
                "as many rows of gate as of up",
                "load the adapter on the model that it was trained for",
            ));
        }
        [gate, up] => gate.or(up).unwrap_or(0),
    };
    let members = sides.into_iter().enumerate().filter_map(|(nth, module)| {
        let rows = if interleaved {
            Rows { taken: 0..width, first: nth, step: 2 }
        } else {
            Rows::together(width, nth * width)
        };
        let key = SiteKey::Layer(LayerIdx(layer.number), module);
        Some(Member { key, low: low(module)?, rows: vec![rows] })
    });
    fuse(&members.collect::<Vec<_>>(), layer.experts, 2 * width)
}

/// A and B of a flattened pair. For E experts of rank r, the rows of A `[E r, in]` are ordered by expert,
/// then rank; the columns of B `[out, r E]` by rank, then expert, or the other way round in one layout.
/// With swapped roles the transpose is stored, `(B A)^T = A^T B^T`.
fn flatten(Pair { a, b, rank, .. }: Pair, layout: ExpertLayout) -> [LazyTensor; 2] {
    let ([experts, _, input], [_, output, _]) = (a.extents(), b.extents());
    let flat = experts * rank;
    match layout {
        ExpertLayout::TargetParametersSwapped => [
            b.with_strides([flat, output], [rank * output, 1, output]),
            a.with_strides([input, flat], [1, experts, flat]),
        ],
        ExpertLayout::UnslothExpertSlowest => {
            [a.dense([flat, input]), b.with_strides([output, flat], [rank, flat, 1])]
        }
        _ => [a.dense([flat, input]), b.with_strides([output, flat], [1, flat, experts])],
    }
}
