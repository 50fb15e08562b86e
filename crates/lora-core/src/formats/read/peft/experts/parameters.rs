//! PEFT's `target_parameters`: the experts of a parameter flattened into one pair of matrices.

use super::super::keys::{DOWN, GATE_UP};
use super::collect::{ExpertTensors, LayerTensors};
use super::planner::Planner;
use super::release::Release;
use crate::adapter::targets::ends_with_name;
use crate::config::ExpertLayout;
use crate::formats::read::plan::TensorPlan;
use crate::formats::read::view::View;
use crate::modules::TargetModule;
use crate::rules::{Code, Rejection, listed};

/// A parameter of routed experts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Parameter {
    GateUp,
    Down,
}

impl Parameter {
    fn name(self) -> &'static str {
        match self {
            Self::GateUp => GATE_UP,
            Self::Down => DOWN,
        }
    }
}

/// Which of a parameter's extents are the columns of A and the rows of B.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Roles {
    /// A has the inputs, B the outputs.
    Plain,
    /// A has the outputs, B the inputs.
    Swapped,
}

/// How the elements of a flattened pair are ordered.
#[derive(Clone, Copy)]
struct Order {
    roles: Roles,
    layout: ExpertLayout,
}

/// A pair of one or two that a layer has.
#[derive(Clone, Copy)]
struct Pair<'a> {
    a: &'a View,
    b: &'a View,
}

impl Pair<'_> {
    /// Inputs and outputs under the given roles.
    fn dims(self, roles: Roles) -> (usize, usize) {
        let (columns, rows) = (self.a.shape()[1], self.b.shape()[0]);
        match roles {
            Roles::Plain => (columns, rows),
            Roles::Swapped => (rows, columns),
        }
    }
}

/// The pairs of one layer and the parameters that they belong to.
struct Found<'a> {
    layer: u32,
    block: &'a str,
    pairs: Vec<Pair<'a>>,
    /// The parameters that the configuration names for this layer.
    declared: Vec<Parameter>,
}

impl Found<'_> {
    /// The possible assignments of parameters to the pairs.
    fn assignments(&self) -> Vec<Vec<Parameter>> {
        match self.pairs.len() {
            2 => vec![
                vec![Parameter::GateUp, Parameter::Down],
                vec![Parameter::Down, Parameter::GateUp],
            ],
            _ => vec![self.declared.clone()],
        }
    }
}

impl Planner<'_> {
    pub(super) fn parameters(&mut self, tensors: &ExpertTensors) -> Option<ExpertLayout> {
        let mut layers = Vec::new();
        for (layer, tensors) in &tensors.layers {
            layers.push(self.found(*layer, tensors)?);
        }
        use ExpertLayout::*;
        self.refuse_unmarked_interleaving(TargetParametersInterleaved, TargetParameters);
        let roles = self.roles(&layers)?;
        let layout = match roles {
            Roles::Plain => {
                self.choose(&[TargetParameters, TargetParametersInterleaved, UnslothExpertSlowest])?
            }
            Roles::Swapped => self.choose(&[TargetParametersSwapped, UnslothExpertSlowest])?,
        };
        let order = Order { roles, layout };
        for found in &layers {
            let ways = found.assignments();
            let assignment = ways.iter().find(|way| self.fits(found, way, roles))?;
            for (pair, parameter) in found.pairs.iter().zip(assignment) {
                self.parameter(found, *pair, *parameter, order);
            }
        }
        Some(layout)
    }

    /// The pairs of a layer; a rejection if the configuration declares another number of them.
    fn found<'a>(&mut self, layer: u32, tensors: &'a LayerTensors) -> Option<Found<'a>> {
        let block = &tensors.block;
        let mut pairs = Vec::new();
        for halves in [&tensors.inner, &tensors.outer].into_iter().filter(|h| !h.is_empty()) {
            let (a, b) = halves.pair(self.problems)?;
            if let Some(wrong) = [a, b].into_iter().find(|view| view.shape().len() != 2) {
                self.wrong_shape(wrong.name(), wrong.shape(), "two dimensions");
                return None;
            }
            if a.shape()[0] != b.shape()[1] || a.len() == 0 || b.len() == 0 {
                let allowed = format!("as many columns as A {:?} has rows", a.shape());
                self.wrong_shape(b.name(), b.shape(), allowed);
                return None;
            }
            pairs.push(Pair { a, b });
        }
        let declared = self.declared(layer, block);
        let lone_inner = pairs.len() == 1 && tensors.outer.is_empty();
        if pairs.len() != declared.len() || lone_inner {
            let names: Vec<&str> = declared.iter().map(|parameter| parameter.name()).collect();
            self.problems.push(Rejection::new(
                Code::RoutedExpertLayout,
                "target_parameters",
                format!("{} pairs of matrices at layer {layer} {block}", pairs.len()),
                if names.is_empty() {
                    format!("parameters of {block} in target_parameters")
                } else {
                    format!("a pair for each of {}", listed(&names))
                },
                "correct target_parameters in adapter_config.json, or export the adapter again",
            ));
            return None;
        }
        Some(Found { layer, block, pairs, declared })
    }

    /// The parameters of a layer that the configuration names, as PEFT matches them.
    fn declared(&self, layer: u32, block: &str) -> Vec<Parameter> {
        let named = |parameter: &Parameter| {
            let key = self.key(layer, block, *parameter);
            self.config.declaration.parameters.iter().any(|target| ends_with_name(&key, target))
        };
        [Parameter::GateUp, Parameter::Down].into_iter().filter(named).collect()
    }

    fn key(&self, layer: u32, block: &str, parameter: Parameter) -> String {
        format!("{}layers.{layer}.{block}.{}", self.root, parameter.name())
    }

    /// The roles that fit the shapes of all layers. If both fit, the PEFT release that wrote the file
    /// decides.
    fn roles(&mut self, layers: &[Found<'_>]) -> Option<Roles> {
        let possible: Vec<Roles> = [Roles::Plain, Roles::Swapped]
            .into_iter()
            .filter(|roles| {
                let fits = |f: &Found<'_>| f.assignments().iter().any(|w| self.fits(f, w, *roles));
                layers.iter().all(fits)
            })
            .collect();
        match possible[..] {
            [only] => Some(only),
            [] => {
                self.problems.push(self.fits_neither(layers.first()?));
                None
            }
            _ => self.roles_by_release(),
        }
    }

    fn roles_by_release(&mut self) -> Option<Roles> {
        use ExpertLayout::{TargetParameters, TargetParametersSwapped};
        match self.options.moe_layout {
            Some(TargetParametersSwapped) => return Some(Roles::Swapped),
            Some(_) => return Some(Roles::Plain),
            None => {}
        }
        let version = self.config.peft_version.clone();
        if let Some(release) = version.as_deref().and_then(Release::parse) {
            let swapped = release < Release::ROLES_CHANGED;
            return Some(if swapped { Roles::Swapped } else { Roles::Plain });
        }
        self.problems.push(Rejection::new(
            Code::AmbiguousExpertLayout,
            "target_parameters",
            match version {
                Some(version) => {
                    format!("shapes that fit two layouts, and peft_version {version:?}")
                }
                None => "shapes that fit two layouts, and no peft_version".to_owned(),
            },
            "shapes or a peft_version that tell the layout",
            format!(
                "set moe_layout to {TargetParameters} for an adapter of PEFT 0.19.1 or later, to \
                 {TargetParametersSwapped} for one of an earlier release; or read it for its model"
            ),
        ));
        None
    }

    /// Whether the pairs of a layer can be these parameters in these roles: gate and up must have twice as
    /// many rows as down has columns, and the sizes must be those of the model, if it is known.
    fn fits(&self, found: &Found<'_>, assignment: &[Parameter], roles: Roles) -> bool {
        let (mut hidden, mut inner) = (None, None);
        let agree = |known: &mut Option<usize>, size: usize| *known.get_or_insert(size) == size;
        if let Some(model) = &self.options.model {
            (hidden, inner) = (Some(model.hidden), Some(model.moe_intermediate));
        }
        found.pairs.iter().zip(assignment).all(|(pair, parameter)| {
            let (input, output) = pair.dims(roles);
            match parameter {
                Parameter::GateUp => {
                    output.is_multiple_of(2)
                        && agree(&mut hidden, input)
                        && agree(&mut inner, output / 2)
                }
                Parameter::Down => agree(&mut hidden, output) && agree(&mut inner, input),
            }
        })
    }

    fn fits_neither(&self, found: &Found<'_>) -> Rejection {
        let shape = |pair: &Pair<'_>| format!("A {:?} B {:?}", pair.a.shape(), pair.b.shape());
        let shapes: Vec<String> = found.pairs.iter().map(shape).collect();
        let sizes = match &self.options.model {
            Some(model) => {
                format!(" with hidden size {} and inner {}", model.hidden, model.moe_intermediate)
            }
            None => String::new(),
        };
        Rejection::new(
            Code::RoutedExpertLayout,
            format!("layer {} {}", found.layer, found.block),
            listed(&shapes),
            format!("the shapes of {GATE_UP} and {DOWN} of experts{sizes}"),
            "load the adapter on the model that it was trained for",
        )
    }

    /// Adds the sites of a flattened pair.
    fn parameter(
        &mut self,
        found: &Found<'_>,
        pair: Pair<'_>,
        parameter: Parameter,
        order: Order,
    ) -> Option<()> {
        let key = self.key(found.layer, found.block, parameter);
        let rank = self.note_err(self.config.ranks.of(&key))?;
        let rows = pair.a.shape()[0];
        let model = self.options.model.as_ref().map(|model| model.num_experts);
        let experts = model.unwrap_or(rows / rank);
        if experts == 0 || rows != experts * rank {
            self.problems.push(Rejection::new(
                Code::RankMismatch,
                pair.a.name(),
                format!("{rows} rows"),
                match model {
                    Some(experts) => format!("rank {rank} for each of {experts} experts"),
                    None => format!("a multiple of rank {rank}, by r and rank_pattern"),
                },
                "correct r or rank_pattern in adapter_config.json, or load the adapter on the \
                 model that it was trained for",
            ));
            return None;
        }
        let update = self.update(&key, pair.a.name(), rank)?;
        let [a, b] = unflatten(pair, experts, rank, order);
        let (layer, path) = (found.layer, &format!("{}.{}", found.block, parameter.name()));
        if parameter == Parameter::Down {
            self.name(TargetModule::Moe4hToH, path);
            self.insert(layer, TargetModule::Moe4hToH, update, [a.into(), b.into()]);
            return Some(());
        }
        // Gate and up share A.
        let (a, [gate, up]) = (TensorPlan::from(a), self.gate_and_up(b, order.layout)?);
        for (module, b) in [(TargetModule::MoeHTo4h, gate), (TargetModule::MoeGate, up)] {
            self.name(module, path);
            self.insert(layer, module, update, [a.clone(), b.into()]);
        }
        Some(())
    }
}

/// A `[experts, rank, in]` and B `[experts, out, rank]` of a flattened pair.
fn unflatten(pair: Pair<'_>, experts: usize, rank: usize, order: Order) -> [View; 2] {
    // The rows of the first matrix are ordered by expert, then rank; the columns of the second by rank, then
    // expert, except in one layout, which orders them by expert, too.
    let first = pair.a.clone().split(0, experts);
    let second = pair.b.clone();
    let second = match order.layout {
        ExpertLayout::UnslothExpertSlowest => second.split(1, experts).permute([1, 0, 2]),
        _ => second.split(1, rank).permute([2, 0, 1]),
    };
    // With swapped roles the update is the transpose, (B A)^T = A^T B^T.
    match order.roles {
        Roles::Plain => [first, second],
        Roles::Swapped => [second.permute([0, 2, 1]), first.permute([0, 2, 1])],
    }
}
