/// Runs components by name (edgesd/runtime/session.py). Components load on first use; `unload` gives memory back.
///
/// text_encoder: input_ids [1,L] -> encoder_hidden_states [1,L,D]; unet: sample [B,C,h,w], timestep [1],
/// encoder_hidden_states [B,L,D] and what SDXL and LCM add -> model_output; vae_decoder: latents -> image [1,3,H,W].
public protocol Session: AnyObject {
    func run(_ component: String, _ inputs: [String: AnyArray]) throws -> [String: Tensor]
    func load(_ component: String) throws
    func unload(_ component: String)
    func has(_ component: String) -> Bool
    /// Rows a call may have, ascending; nil = any number.
    func batches(_ component: String) -> [Int]?
    /// Those the component comes in, the widest first.
    func widths(_ component: String) -> [Double]
    /// What later runs compute with; the old one is let go. RequestError where there is none.
    func useWidth(_ component: String, _ width: Double) throws
}

/// One opened artefact: inputs by name -> outputs by name.
public typealias Call = ([String: AnyArray]) throws -> [String: AnyArray]

/// The session over the variants of a bundle (targets/_session.py): picks variants, checks inputs, chains chunks. What
/// opens a file comes from outside: Core ML in an app, a stand-in in tests.
public final class ComponentSession: Session {
    private let bundle: ModelBundle
    private let open: (Variant) throws -> Call
    private let precision, form: String?
    private let oneAtATime: Bool
    private var chosen: [String: [Int: [Variant]]] = [:]
    private var opened: [String: [Int: [Call]]] = [:]

    /// precision, form: the variant wanted, of each component that comes in several. oneAtATime: opening a component
    /// lets go of the others. RequestError for a value that nothing in the bundle has.
    public init(
        _ bundle: ModelBundle, precision: String? = nil, form: String? = nil, oneAtATime: Bool = false,
        open: @escaping (Variant) throws -> Call
    ) throws {
        (self.bundle, self.precision, self.form, self.oneAtATime, self.open) = (bundle, precision, form, oneAtATime, open)
        for component in bundle.manifest.components {
            chosen[component.name] = try byBatch(component.name, choose(component, width: nil))
        }
    }

    public func has(_ component: String) -> Bool { chosen[component] != nil }

    public func batches(_ component: String) -> [Int]? { chosen[component]?.keys.sorted() }

    public func load(_ component: String) throws { _ = try calls(component, try variants(component).keys.max()!) }

    public func unload(_ component: String) { opened[component] = nil }

    /// The variants in use of a component's smallest batch: its chunks in the order they run.
    public func inUse(_ component: String) -> [Variant] {
        chosen[component].flatMap { $0[$0.keys.min()!] } ?? []
    }

    public func widths(_ component: String) -> [Double] {
        guard let now = inUse(component).first?.axes, let all = try? bundle.manifest.component(component).variants else { return [] }
        let like = all.map(\.axes).filter { axes in
            var same = axes
            same.width = now.width
            return withoutBatch(same) == withoutBatch(now)
        }
        return Set(like.map(\.width)).sorted(by: >)
    }

    public func useWidth(_ component: String, _ width: Double) throws {
        guard let now = inUse(component).first?.axes, widths(component).contains(width) else {
            throw requestError("width \(plain(width)) of \(component)",
                               "this model has \(widths(component).map(plain).joined(separator: ", "))",
                               "Choose one of these, or package with --widths")
        }
        guard width != now.width else { return }
        unload(component)
        chosen[component] = try byBatch(component, choose(try bundle.manifest.component(component), width: width))
    }

    public func run(_ component: String, _ inputs: [String: AnyArray]) throws -> [String: Tensor] {
        let byBatch = try variants(component)
        let rows = Set(inputs.values.compactMap(\.shape.first)).intersection(byBatch.keys)
        let batch = rows.max() ?? byBatch.keys.min()!, chunks = byBatch[batch]!
        var known = try checked(component, chunks, inputs)
        for (variant, call) in zip(chunks, try calls(component, batch)) {
            var given: [String: AnyArray] = [:]
            for spec in variant.inputs { given[spec.name] = known[spec.name] }
            let made = try call(given)
            for spec in variant.outputs {
                guard let array = made[spec.name], array.shape == spec.shape else {
                    throw dataError("\(component) gave no \(spec.name) of shape \(spec.shape)", "what its manifest says",
                                    "Package the model again")
                }
                known[spec.name] = array
            }
        }
        var outputs: [String: Tensor] = [:]
        for spec in chunks.last!.outputs { outputs[spec.name] = known[spec.name]?.f32 }
        return outputs
    }

    private func variants(_ component: String) throws -> [Int: [Variant]] {
        if let found = chosen[component] { return found }
        throw requestError("the bundle has no component '\(shown(component))'", chosen.keys.sorted().joined(separator: ", "),
                           "Package the model with it")
    }

    private func calls(_ component: String, _ batch: Int) throws -> [Call] {
        if let found = opened[component]?[batch] { return found }
        if oneAtATime { opened = opened.filter { $0.key == component } }
        let made = try variants(component)[batch]!.map { variant in
            for file in variant.files { _ = try bundle.path(file) }
            return try open(variant)
        }
        opened[component, default: [:]][batch] = made
        return made
    }

    /// The variants that fit what is wanted: they differ in batch and chunk alone.
    private func choose(_ component: Component, width: Double?) throws -> [Variant] {
        var left = component.variants
        let everything = bundle.manifest.components.flatMap(\.variants).map(\.axes)
        func keep(_ wanted: String?, _ name: String, _ value: (Axes) -> String) throws {
            guard let wanted else { return }
            guard everything.contains(where: { value($0) == wanted }) else {
                throw requestError("\(name) '\(shown(wanted))'", "this bundle has \(Set(everything.map(value)).sorted())",
                                   "Choose one of these, or package again")
            }
            let fitting = left.filter { value($0.axes) == wanted }
            if !fitting.isEmpty { left = fitting }
        }
        if let width { left = left.filter { $0.axes.width == width } }
        let now = inUse(component.name).first?.axes  // a change of width keeps the rest
        try keep(now?.precision ?? precision, "precision") { $0.precision }
        try keep(now?.form ?? form, "form") { $0.form }
        if ["unet", "vae_decoder", "vae_encoder"].contains(component.name) {
            let own = left.filter { $0.axes.sizePx == bundle.manifest.model.defaults.sizePx }
            if !own.isEmpty { left = own }
        }
        let first = withoutBatch(left[0].axes)
        return left.filter { withoutBatch($0.axes) == first }
    }
}

private func withoutBatch(_ axes: Axes) -> Axes {
    var out = axes
    (out.batch, out.chunk) = (1, [0, 1])
    return out
}

/// Batch -> the variant's chunks in the order they run. DataError if a chunk is missing or there twice.
private func byBatch(_ component: String, _ variants: [Variant]) throws -> [Int: [Variant]] {
    try Dictionary(grouping: variants, by: \.axes.batch).mapValues { chunks in
        let sorted = chunks.sorted { $0.axes.chunk.lexicographicallyPrecedes($1.axes.chunk) }
        guard sorted.map(\.axes.chunk) == sorted.indices.map({ [$0, sorted.count] }) else {
            let found = sorted.map { "\($0.axes.chunk[0] + 1) of \($0.axes.chunk[1])" }.joined(separator: ", ")
            throw dataError("\(component) has the chunks \(found)", "each chunk once", "Package the model again")
        }
        return sorted
    }
}

/// The inputs in the types the chunks expect. RequestError for a name, shape or kind they do not.
private func checked(_ component: String, _ chunks: [Variant], _ inputs: [String: AnyArray]) throws -> [String: AnyArray] {
    var needed: [String: TensorSpec] = [:], made: Set<String> = []
    for variant in chunks {
        for spec in variant.inputs where !made.contains(spec.name) { needed[spec.name] = spec }
        made.formUnion(variant.outputs.map(\.name))
    }
    let wrong = Set(inputs.keys).symmetricDifference(needed.keys)
    guard wrong.isEmpty else {
        throw requestError("inputs of \(component) differ in \(wrong.sorted().joined(separator: ", "))",
                           needed.keys.sorted().joined(separator: ", "), "Pass exactly these")
    }
    return try Dictionary(uniqueKeysWithValues: needed.map { (name: String, spec: TensorSpec) -> (String, AnyArray) in
        let array = inputs[name]!
        guard array.shape == spec.shape else {
            throw requestError("\(component) got \(name) of shape \(array.shape)", "\(spec.shape)",
                               "Pass that shape, or package the model for this one")
        }
        switch (spec.dtype, array) {
        case ("int32", .i64(let x)): return (name, .i32(NDArray(x.shape, x.values.map { Int32(truncatingIfNeeded: $0) })))
        case ("int64", .i64), ("int32", .i32), ("float32", .f32), ("float16", .f32): return (name, array)
        default: throw requestError("\(component) got another type of \(name)", spec.dtype, "Pass that type")
        }
    })
}
